"""Folding against the block as it was, for every family, with every place that a factor can go to."""

import copy

import pytest
import torch
from torch import nn

from algorithms.modeling.activations import embed
from algorithms.modeling.families.table import architecture_for
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.folding import can_fold, feeder_rows, fold, group_of, shared
from tests.support.families.cases import save_case
from tests.support.models import FAMILIES, save_family, token_sequences

CPU = torch.device("cpu")


def _factors(block, architecture, leader, seed):
    columns = block.get_submodule(leader).weight.shape[1]
    factors = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) * 4 + 0.25
    return shared(factors, feeder_rows(block, architecture, leader)) if leader in architecture.feeders else factors


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_computes_what_it_did(tmp_path, family, changes):
    source = ModelSource(save_family(tmp_path / "m", family, **changes))
    architecture = source.architecture
    (inputs,) = embed(source, [token_sequences(2, 12)], batch_size=2, device=CPU, offload=True)
    block = source.load_block(1)
    before = inputs.through(block, 1).batches[0]
    original = copy.deepcopy(block)
    leaders = [group[0] for group in architecture.input_groups]
    for seed, leader in enumerate(leaders):
        assert can_fold(architecture, leader)
        fold(block, architecture, leader, _factors(block, architecture, leader, seed))
    after = inputs.through(block, 1).batches[0]
    # A value projection's bias is rounded to float16 by nobody here: nothing but float32 is left between the two.
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)
    for name in architecture.linears:
        assert not torch.allclose(block.get_submodule(name).weight, original.get_submodule(name).weight, rtol=0.05)
    for name in architecture.input_norms.values():
        stored = block.get_submodule(name).weight
        assert torch.equal(stored, stored.half().float())


def test_the_inputs_of_a_group_are_divided(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "qwen2"))
    architecture = source.architecture
    (inputs,) = embed(source, [token_sequences(1, 8)], batch_size=1, device=CPU, offload=True)
    for seed, leader in enumerate(group[0] for group in architecture.input_groups):
        block = source.load_block(0)
        seen = []
        block.get_submodule(leader).register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        inputs.through(block, 0)
        factors = _factors(block, architecture, leader, seed)
        fold(block, architecture, leader, factors)
        inputs.through(block, 0)
        torch.testing.assert_close(seen[1] * factors, seen[0], rtol=2e-3, atol=1e-5)


def test_each_channel_knows_the_row_that_feeds_it(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))  # 4 query heads of 8 over 2 heads of values
    rows = feeder_rows(source.load_block(0), source.architecture, "self_attn.o_proj")
    expected = [[head // 2 * 8 + place for place in range(8)] for head in range(4)]
    assert rows.tolist() == [row for head in expected for row in head]
    assert feeder_rows(source.load_block(0), source.architecture, "mlp.down_proj").tolist() == list(range(64))


def test_channels_of_one_row_share_the_geometric_mean_of_their_factors():
    found = shared(torch.tensor([1.0, 8.0, 4.0, 2.0]), torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([2.0, 4.0, 2.0, 4.0]))


def test_a_gain_of_zero_keeps_its_channel_as_it_is():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.input_layernorm = nn.LayerNorm(3)
            self.self_attn = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self.self_attn, name, nn.Linear(3, 2))

    block = Block().requires_grad_(False)
    block.input_layernorm.weight.copy_(torch.tensor([0.0, 2.0, 2.0]))
    block.input_layernorm.bias.copy_(torch.tensor([1.0, 1.0, 1.0]))
    architecture = architecture_for("llama")
    inputs, names = torch.randn(5, 3), group_of(architecture, "self_attn.q_proj")
    before = [block.get_submodule(name)(block.input_layernorm(inputs)) for name in names]
    fold(block, architecture, "self_attn.q_proj", torch.tensor([4.0, 4.0, 1e9]))
    after = [block.get_submodule(name)(block.input_layernorm(inputs)) for name in names]
    for now, then in zip(after, before, strict=True):
        torch.testing.assert_close(now, then)
    # The third gain would have become nothing in float16: it stays as well.
    assert block.input_layernorm.weight.tolist() == [0.0, 0.5, 2.0]
    assert block.input_layernorm.bias.tolist() == [1.0, 0.25, 1.0]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_values_that_are_cut_off_take_no_factors(tmp_path, clip):
    """OLMoE's clip_qkv: what is cut off does not grow with what is before it."""
    source = ModelSource(save_case(tmp_path / "m", "olmoe", clip_qkv=clip))
    architecture = source.architecture
    (inputs,) = embed(source, [token_sequences(2, 12)], batch_size=2, device=CPU, offload=True)
    block = source.load_block(0)
    before = inputs.through(block, 0).batches[0]
    leaders = [group[0] for group in architecture.input_groups if can_fold(architecture, group[0])]
    assert ("self_attn.o_proj" in leaders) is (clip is None)
    for seed, leader in enumerate(leaders):
        fold(block, architecture, leader, _factors(block, architecture, leader, seed))
    torch.testing.assert_close(inputs.through(block, 0).batches[0], before, atol=2e-5, rtol=1e-4)
