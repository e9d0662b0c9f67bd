"""Another order of channels: the block computes what it did, and channels of one size stand together."""

import copy

import pytest
import torch

from algorithms.modeling.activations import embed
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.reorder import SEQUENTIAL, TRANSPOSE, channel_order, reorder
from algorithms.modeling.transforms.survey import whole_survey
from tests.support.models import FAMILIES, save_family, token_sequences

CPU = torch.device("cpu")
LEADERS = ("self_attn.o_proj", "mlp.down_proj")


def _sizes(block, leader, seed=0):
    return torch.rand(block.get_submodule(leader).weight.shape[1], generator=torch.Generator().manual_seed(seed))


def _inputs(source, count=2):
    return embed(source, [token_sequences(count, 12)], batch_size=2, device=CPU, offload=True)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("index", [SEQUENTIAL, TRANSPOSE])
@pytest.mark.parametrize("biased", [False, True])
def test_the_block_computes_what_it_did(tmp_path, family, index, biased):
    biases = {"attention_bias": True, "mlp_bias": True} if biased and family == "llama" else {}
    source = ModelSource(save_family(tmp_path / "m", family, **biases))
    inputs, block = _inputs(source), source.load_block(1)
    before, original = inputs.through(block, 1).batches[0], copy.deepcopy(block)
    for leader in LEADERS:
        order = channel_order(block, source.architecture, leader, _sizes(block, leader), index=index, group_size=4)
        reorder(block, source.architecture, leader, order)
    torch.testing.assert_close(inputs.through(block, 1).batches[0], before, atol=1e-5, rtol=1e-5)
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, original.state_dict()[name])}
    places = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {f"{place}.weight" for place in places}
    moved = ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    expected |= {f"{place}.bias" for place in moved} & original.state_dict().keys()
    assert changed == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_come_in_the_new_order(tmp_path, family):
    source = ModelSource(save_family(tmp_path / "m", family))
    inputs, block = _inputs(source), source.load_block(0)
    before = whole_survey(block, 0, inputs, source.architecture)
    for leader in LEADERS:
        order = channel_order(block, source.architecture, leader, before[leader].largest, index=SEQUENTIAL, group_size=8)
        reorder(block, source.architecture, leader, order)
        after = whole_survey(block, 0, inputs, source.architecture)[leader]
        expected = before[leader].reordered(order.channels)
        for name in ("hessian", "mean_size", "largest", "sample"):
            torch.testing.assert_close(getattr(after, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


def test_heads_keep_to_themselves_and_share_the_order_of_their_values(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))  # four heads of eight channels over two heads of values
    block = source.load_block(0)
    sizes = _sizes(block, "self_attn.o_proj")
    order = channel_order(block, source.architecture, "self_attn.o_proj", sizes, index=SEQUENTIAL, group_size=128)
    for shared in range(2):
        first, second = (sizes[8 * head : 8 * head + 8] for head in (2 * shared, 2 * shared + 1))
        largest = [max(pair) for pair in zip(first.tolist(), second.tolist(), strict=True)]
        expected = sorted(range(8), key=lambda place, largest=largest: -largest[place])
        assert order.rows[8 * shared : 8 * shared + 8].tolist() == [8 * shared + place for place in expected]
        for head in (2 * shared, 2 * shared + 1):
            assert order.channels[8 * head : 8 * head + 8].tolist() == [8 * head + place for place in expected]


def test_channels_behind_a_gate_are_sorted_all_together(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    block = source.load_block(0)
    sizes = _sizes(block, "mlp.down_proj")
    order = channel_order(block, source.architecture, "mlp.down_proj", sizes, index=SEQUENTIAL, group_size=16)
    assert torch.equal(order.rows, order.channels)
    assert sizes[order.channels].tolist() == sorted(sizes.tolist(), reverse=True)
    dealt = channel_order(block, source.architecture, "mlp.down_proj", sizes, index=TRANSPOSE, group_size=16)
    sorted_sizes = sorted(sizes.tolist(), reverse=True)
    for group in range(4):  # the first, fifth, ninth ... of the sorted channels in the first group, and so on
        assert sizes[dealt.channels[16 * group : 16 * group + 16]].tolist() == sorted_sizes[group::4]


def test_where_a_run_is_one_group_there_is_nothing_to_deal_out(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    block = source.load_block(0)
    sizes = _sizes(block, "self_attn.o_proj")
    orders = [
        channel_order(block, source.architecture, "self_attn.o_proj", sizes, index=index, group_size=16)
        for index in (SEQUENTIAL, TRANSPOSE)
    ]
    assert torch.equal(orders[0].channels, orders[1].channels)


def test_statistics_are_those_of_a_computation_by_hand(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "qwen2"))
    inputs, block = _inputs(source, count=3), source.load_block(0)
    found = whole_survey(block, 0, inputs, source.architecture)
    seen = {}
    for leader in found:
        block.get_submodule(leader).register_forward_pre_hook(
            lambda module, args, leader=leader: seen.setdefault(leader, []).append(args[0].flatten(0, 1))
        )
    inputs.through(block, 0)
    for leader, statistics in found.items():
        tokens = torch.cat(seen[leader]).double()
        torch.testing.assert_close(statistics.hessian.double(), tokens.T @ tokens / 36, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.mean_size.double(), tokens.abs().mean(0), rtol=1e-4, atol=1e-7)
        assert torch.equal(statistics.largest.double(), tokens.abs().amax(0))
        torch.testing.assert_close(statistics.sample.double(), tokens, rtol=1e-4, atol=1e-6)
