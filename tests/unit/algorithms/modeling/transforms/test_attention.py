"""What attention is given, and factors between queries and keys, against blocks as they were and sums written out."""

import copy

import pytest
import torch

from algorithms.modeling.activations import embed
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.attention import attention_survey, observed, of_key_heads, of_pairs, scores, smooth_keys
from algorithms.modeling.transforms.serving import CacheQuantization, Serving
from tests.support.models import FAMILIES, confident, save_family, token_sequences

CPU = torch.device("cpu")


def _source(folder, family, **changes):
    return ModelSource(confident(save_family(folder, family, **changes)))


def _inputs(source, count=3, length=12, batch_size=2):
    return embed(source, [token_sequences(count, length)], batch_size=batch_size, device=CPU, offload=True)[0]


def _factors(source, seed=0):
    """Factors [K, d] that are equal in rotary pairs, and where norms take them in all heads."""
    config = source.config
    heads = 1 if source.architecture.qk_norms is not None else config.num_key_value_heads
    sizes = torch.rand(heads, config.head_dim, generator=torch.Generator().manual_seed(seed)) * 4 + 0.25
    return of_pairs(sizes).expand(config.num_key_value_heads, -1)


def _seen(block, source, inputs, index=1):
    """Queries, keys and values of every batch, in one list each."""
    found = []
    with observed(block, source.architecture, lambda *states: found.append(states)):
        inputs.through(block, index)
    return [torch.cat(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_block_computes_what_it_did(tmp_path, family, biased):
    source = _source(tmp_path / "m", family, **({"attention_bias": True} if biased else {}))
    inputs, block = _inputs(source), source.load_block(1)
    before, original = inputs.through(block, 1).batches[0], copy.deepcopy(block)
    states = _seen(block, source, inputs)
    factors = _factors(source)
    smooth_keys(block, source.architecture, factors)
    after = inputs.through(block, 1).batches[0]
    torch.testing.assert_close(after, before, atol=1e-4 * before.abs().max().item(), rtol=0)
    queries, keys, values = _seen(block, source, inputs)
    torch.testing.assert_close(keys * factors[:, None], states[1], rtol=1e-4, atol=1e-4 * keys.abs().max().item())
    repeated = torch.stack([factors[head // 2] for head in range(4)])  # four query heads over two of keys
    torch.testing.assert_close(queries / repeated[:, None], states[0], rtol=1e-4, atol=1e-4 * queries.abs().max().item())
    assert torch.equal(values, states[2])
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, original.state_dict()[name])}
    biases = {f"self_attn.{name}_proj.bias" for name in "qk"} & block.state_dict().keys()
    places = {"self_attn.q_norm", "self_attn.k_norm"} if family == "qwen3" else {"self_attn.q_proj", "self_attn.k_proj"}
    assert changed == {f"{place}.weight" for place in places} | (set() if family == "qwen3" else biases)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_that_differ_within_a_pair_would_not_pass(tmp_path, family):
    source = _source(tmp_path / "m", family)
    inputs, block = _inputs(source), source.load_block(1)
    before = _seen(block, source, inputs)
    factors = _factors(source).clone()
    factors[:, 0] *= 3
    smooth_keys(block, source.architecture, factors)
    after = _seen(block, source, inputs)
    wanted, found = (scores(states[0][0], states[1][0]) for states in (before, after))
    assert (found - wanted).norm() > 1e-2 * wanted.norm()


def test_a_gain_of_nothing_does_not_part_its_pair(tmp_path):
    source = _source(tmp_path / "m", "qwen3")
    inputs, block = _inputs(source), source.load_block(1)
    block.self_attn.k_norm.weight[1] = 0.0
    before = inputs.through(block, 1).batches[0]
    smooth_keys(block, source.architecture, _factors(source))
    assert block.self_attn.k_norm.weight[1] == 0.0
    torch.testing.assert_close(inputs.through(block, 1).batches[0], before, atol=1e-4 * before.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_a_computation_by_hand(tmp_path, family):
    source = _source(tmp_path / "m", family)
    inputs, block = _inputs(source, count=3), source.load_block(1)
    found = attention_survey(block, 1, inputs, source.architecture)
    linears = {}
    for name in source.architecture.qkv:
        block.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: linears.setdefault(name, []).append(output)
        )
    inputs.through(block, 1)
    heads, config = {}, source.config
    for name, outputs in linears.items():
        rows = torch.cat(outputs).double()  # [sequences, length, rows]
        heads[name] = rows.view(*rows.shape[:2], -1, config.head_dim).transpose(1, 2)
    queries, keys, values = (heads[name] for name in source.architecture.qkv)
    if family == "qwen3":
        norms = [block.get_submodule(name).weight.double() for name in source.architecture.qk_norms]
        queries, keys = (
            states / (states.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * norm
            for states, norm in zip((queries, keys), norms, strict=True)
        )
    base = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    width = config.head_dim
    angles = torch.arange(12).double()[:, None] * base ** (-torch.arange(0, width, 2).double() / width)
    turned = []
    for states in (queries, keys):
        first, second = states.chunk(2, -1)
        turned.append(
            torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)
        )
    for name, states in zip(("largest_query", "largest_key", "largest_value"), (*turned, values), strict=True):
        torch.testing.assert_close(getattr(found, name).double(), states.abs().amax((0, 2)), rtol=1e-4, atol=1e-6)
    assert found.largest == pytest.approx([states.abs().max().item() for states in (*turned, values)], rel=1e-4)
    # Fewer tokens than a sample has: all of them, one sequence after another.
    for sample, states in zip((found.queries, found.keys), turned, strict=True):
        torch.testing.assert_close(sample.double(), states.transpose(0, 1).flatten(1, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_looking_changes_nothing(tmp_path, attention):
    source = ModelSource(save_family(tmp_path / "m", "llama"), attn_implementation=attention)
    inputs, block = _inputs(source), source.load_block(0)
    Serving(activation_bits=8, cache=CacheQuantization(bits=4)).apply(block, source.architecture.linears, source.architecture)
    before, config, hooks = inputs.through(block, 0).batches[0], block.self_attn.config, dict(vars(block.self_attn))
    attention_survey(block, 0, inputs, source.architecture)
    with pytest.raises(ZeroDivisionError), observed(block, source.architecture, lambda *states: 1 / 0):
        inputs.through(block, 0)
    assert block.self_attn.config is config
    assert vars(block.self_attn) == hooks
    assert torch.equal(inputs.through(block, 0).batches[0], before)


def test_a_sample_has_tokens_of_all_sequences(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    inputs, block = _inputs(source, count=40, length=30, batch_size=4), source.load_block(0)
    found = attention_survey(block, 0, inputs, source.architecture)
    assert found.queries.shape[1] == found.keys.shape[1] == 10 * -(-512 // 10)
    keys = _seen(block, source, inputs, 0)[1]
    expected = torch.cat([part.transpose(0, 1).flatten(1, 2)[:, ::2][:, :52] for part in keys.split(4)], 1)
    torch.testing.assert_close(found.keys, expected)


def test_tokens_that_are_not_finite_count_for_nothing(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    inputs, block = _inputs(source, count=2, batch_size=2), source.load_block(0)
    clean = attention_survey(block, 0, inputs, source.architecture)
    inputs.batches[0] = inputs.batches[0].clone()
    inputs.batches[0][1, 5] = torch.nan
    found = attention_survey(block, 0, inputs, source.architecture)
    kept = [place for place in range(24) if place != 12 + 5]
    assert torch.equal(found.keys, clean.keys[:, kept])
    assert torch.equal(found.queries, clean.queries[:, kept])
    assert torch.all(found.largest_value <= clean.largest_value)
    assert torch.isfinite(found.largest_key).all()


def test_smoothed_statistics_are_those_of_the_smoothed_block(tmp_path):
    source = _source(tmp_path / "m", "qwen2")
    inputs, block = _inputs(source), source.load_block(1)
    factors = _factors(source)
    expected = attention_survey(block, 1, inputs, source.architecture).smoothed(factors)
    smooth_keys(block, source.architecture, factors)
    found = attention_survey(block, 1, inputs, source.architecture)
    for name in ("largest_query", "largest_key", "largest_value", "queries", "keys"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3)


def test_pairs_and_heads_by_hand():
    sizes = torch.tensor([[1.0, 5.0, 3.0, 2.0], [7.0, 1.0, 0.0, 4.0], [2.0, 2.0, 9.0, 1.0], [0.0, 8.0, 1.0, 1.0]])
    assert of_pairs(sizes[:2]).tolist() == [[3.0, 5.0, 3.0, 5.0], [7.0, 4.0, 7.0, 4.0]]
    assert of_key_heads(sizes, 2).tolist() == [[7.0, 5.0, 3.0, 4.0], [2.0, 8.0, 9.0, 1.0]]
    queries, keys = torch.randn(4, 3, 5), torch.randn(2, 6, 5)
    found = scores(queries, keys)
    for head in range(4):
        torch.testing.assert_close(found[head // 2, head % 2], queries[head] @ keys[head // 2].T)
