"""What is done to a block before its weights are coded: what stays, and which candidate is taken, by comparing all by hand."""

import copy
import math
from itertools import product

import pytest
import torch

from algorithms.blockwise.coded import FreshBlock
from algorithms.modeling.activations import embed
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.attention import attention_survey, of_pairs
from algorithms.modeling.transforms.survey import whole_survey
from algorithms.numerics.activations.rounding import fake_quantize_cache
from algorithms.quantization.lmquant.calibration import Coder
from algorithms.quantization.lmquant.preparation import AS_IT_IS, smoothing_factors
from tests.support.models import FAMILIES, confident, save_family, token_sequences
from tests.unit.algorithms.quantization.lmquant.recipes import algorithm

CPU = torch.device("cpu")
SEARCHED = {"strategy": "GridSearch", "num_grids": 4}
ALL_SEARCHED = {
    "reorder": {"strategy": "GridSearch"},
    "smooth": {"xw": {**SEARCHED, "beta": -2}, "yx": {**SEARCHED, "beta": -2}},
}


def _fresh(folder, family="llama", **changes):
    source = ModelSource(confident(save_family(folder, family, **changes)))
    (inputs,) = embed(source, [token_sequences(3, 16)], batch_size=2, device=CPU, offload=True)
    return FreshBlock(index=1, block=source.load_block(1), inputs=inputs, architecture=source.architecture)


def _settings(preset, **quant):
    return algorithm(preset, quant=quant).config.settings


def _prepare(fresh, preset, **quant):
    return Coder(_settings(preset, **quant)).prepare(fresh)


def _output(fresh):
    return fresh.inputs.through(fresh.block, fresh.index).batches[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("preset", "quant"), [("g128", {}), ("g128", ALL_SEARCHED), ("gchn", {}), ("awq", {}), ("sq_static", {})]
)
def test_the_block_computes_what_it_did(tmp_path, family, preset, quant):
    fresh = _fresh(tmp_path / "m", family, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {}))
    before, original = _output(fresh), copy.deepcopy(fresh.block)
    report = _prepare(fresh, preset, **quant)
    after = _output(fresh)
    assert ((after - before).norm() / before.norm()).item() < 1e-4
    changed = {
        name for name, tensor in fresh.block.state_dict().items() if not torch.equal(tensor, original.state_dict()[name])
    }
    assert changed
    parts = {"g128": {"reorder", "smooth_xw", "smooth_yx"}, "gchn": {"smooth_xw", "smooth_yx"}, "awq": {"smooth_xw"}}
    assert set(report) == parts.get(preset, {"smooth_xw", "cache_ranges"})


def test_what_is_switched_off_is_left_alone(tmp_path):
    fresh = _fresh(tmp_path / "m")
    original = copy.deepcopy(fresh.block.state_dict())
    assert _prepare(fresh, "g128", enable_reorder=False, enable_smooth=False) == {}
    assert all(torch.equal(tensor, original[name]) for name, tensor in fresh.block.state_dict().items())
    skips = {"skip_proj_out": True}
    report = _prepare(fresh, "g128", reorder=skips, smooth={"xw": skips, "enable_yx": False})
    assert set(report["reorder"]) == set(report["smooth_xw"]) == {"mlp.down_proj"}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"):
        assert torch.equal(fresh.block.get_submodule(name).weight, original[f"{name}.weight"])


def test_channels_are_smoothed_by_the_published_formula(tmp_path):
    fresh = _fresh(tmp_path / "m")
    found, original = whole_survey(fresh.block, 1, fresh.inputs, fresh.architecture), copy.deepcopy(fresh.block.state_dict())
    report = _prepare(fresh, "gchn", smooth={"xw": {"alpha": 0.25, "beta": 0.75}, "enable_yx": False})
    assert report["smooth_xw"] == {key: {"alpha": 0.25, "beta": 0.75} for key in ("self_attn.o_proj", "mlp.down_proj")}
    now = fresh.block.state_dict()
    for reader, writer in (("self_attn.o_proj", "self_attn.v_proj"), ("mlp.down_proj", "mlp.up_proj")):
        inputs, weight = found[reader].largest, original[f"{reader}.weight"]
        for channel in range(weight.shape[1]):
            # Channels of two query heads stand on one head of values: the larger of both counts.
            row = channel // 16 * 8 + channel % 8 if reader.endswith("o_proj") else channel
            twins = [row // 8 * 16 + row % 8 + offset for offset in (0, 8)] if reader.endswith("o_proj") else [channel]
            a, b = (max(sizes[twin].item() for twin in twins) for sizes in (inputs, weight.abs().amax(0)))
            factor = a**0.25 / b**0.75
            torch.testing.assert_close(now[f"{reader}.weight"][:, channel], weight[:, channel] * factor, rtol=1e-4, atol=0)
            torch.testing.assert_close(
                now[f"{writer}.weight"][row], original[f"{writer}.weight"][row] / factor, rtol=1e-4, atol=0
            )


def test_of_two_exponents_the_pair_that_loses_least_is_taken(tmp_path):
    fresh = _fresh(tmp_path / "m")
    found = whole_survey(fresh.block, 1, fresh.inputs, fresh.architecture)["mlp.down_proj"]
    tokens, matrix = found.sample.double(), fresh.block.mlp.down_proj.weight.double()
    losses = {}
    for pair in [(0.0, 0.0), *((c / 4, 0.0) for c in range(1, 4)), *((c / 4, 1 - c / 4) for c in range(1, 4))]:
        factors = found.largest.double() ** pair[0] / matrix.abs().amax(0) ** pair[1]
        scaled, states = matrix * factors, tokens / factors
        steps = states.abs().amax(1, keepdim=True) / 127.5
        states = (states / steps).round().clamp(-128, 127) * steps
        rounded = torch.empty_like(scaled)
        for row, start in product(range(32), range(0, 64, 16)):
            part = scaled[row, start : start + 16]
            step = torch.tensor(part.abs().max().item() * 2 / 15).half().item()
            rounded[row, start : start + 16] = (part / step).round().clamp(-8, 7) * step
        losses[pair] = (states @ rounded.T - tokens @ matrix.T).square().sum().item()
    report = _prepare(fresh, "w4a8kv4_sym", smooth={"xw": {**SEARCHED, "alpha": 0.5, "beta": -2}})
    chosen = report["smooth_xw"]["mlp.down_proj"]
    assert losses[chosen["alpha"], chosen["beta"]] <= 1.001 * min(losses.values())
    assert min(losses.values()) < 0.95 * losses[0.0, 0.0]


@pytest.mark.parametrize("queries", [False, True])
def test_keys_are_smoothed_with_the_exponents_that_keep_scores(tmp_path, queries):
    fresh = _fresh(tmp_path / "m")
    fresh.block.self_attn.k_proj.weight[5] *= 8  # one loud channel
    before = attention_survey(fresh.block, 1, fresh.inputs, fresh.architecture)
    wanted = {head: before.queries[head].double() @ before.keys[head // 2].double().T for head in range(4)}
    losses = {}
    for pair in [(0.0, 0.0), *((c / 4, 0.0) for c in range(1, 4)), *((c / 4, 1 - c / 4) for c in range(1, 4))]:
        losses[pair] = 0.0
        for head in range(4):
            group = before.largest_query[head // 2 * 2 : head // 2 * 2 + 2].amax(0)
            factors = of_pairs(before.largest_key[head // 2]) ** pair[0] / of_pairs(group) ** pair[1]
            query, key = before.queries[head] * factors, before.keys[head // 2] / factors
            held = fake_quantize_cache(key, 4, 8)
            asked = fake_quantize_cache(query, 4, 8) if queries else query
            losses[pair] += (asked.double() @ held.double().T - wanted[head]).square().sum().item()
    keys = {"opts": {"skip_attn_q": not queries}, "smooth": {"enable_xw": False, "yx": {**SEARCHED, "alpha": 0.5, "beta": -2}}}
    chosen = _prepare(fresh, "g128", enable_reorder=False, **keys)["smooth_yx"]
    assert losses[chosen["alpha"], chosen["beta"]] <= 1.001 * min(losses.values())
    assert min(losses.values()) < 0.9 * losses[0.0, 0.0]


def test_without_a_cache_of_keys_a_search_finds_nothing_to_smooth(tmp_path):
    fresh = _fresh(tmp_path / "m")
    for opts in ({"dtype": None}, {"skip_attn_k": True}):
        report = _prepare(fresh, "gchn", opts=opts)
        assert report["smooth_yx"] == {"alpha": 0.0, "beta": 0.0}


def test_a_static_range_is_known_to_the_search_and_told_as_it_is_afterwards(tmp_path):
    fresh = _fresh(tmp_path / "m")
    fresh.block.self_attn.k_proj.weight[5] *= 20
    report = _prepare(fresh, "sq_static", opts={"dtype": "sint4"}, smooth={"enable_yx": True, "yx": {**SEARCHED, "beta": -2}})
    assert report["smooth_yx"]["alpha"] > 0
    after = attention_survey(fresh.block, 1, fresh.inputs, fresh.architecture)
    assert list(report["cache_ranges"]) == ["queries", "keys", "values"]
    assert list(report["cache_ranges"].values()) == pytest.approx(after.largest, rel=1e-4)


def _rounding_loss(matrix, metric):
    """<dW H, dW> of rounding groups of sixteen to whole zeros and scales of four bits, one by one."""
    rounded = torch.empty_like(matrix)
    for row, start in product(range(matrix.shape[0]), range(0, matrix.shape[1], 16)):
        part = matrix[row, start : start + 16]
        low, high = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
        step, zero = torch.tensor((high - low) / 15).half().item(), round(-low / ((high - low) / 15))
        rounded[row, start : start + 16] = ((part / step + zero).round().clamp(0, 15) - zero) * step
    difference = (rounded - matrix).double()
    return ((difference @ metric.double()) * difference).sum().item()


@pytest.mark.parametrize("loud", [1.0, 20.0])
def test_the_order_is_taken_in_which_rounding_costs_least(tmp_path, loud):
    fresh = _fresh(tmp_path / "m")
    sizes = torch.ones(64)
    sizes[::8] = loud  # two loud channels in every group of sixteen
    fresh.block.mlp.down_proj.weight.mul_(sizes)
    fresh.block.mlp.up_proj.weight.mul_(sizes[:, None])
    found = whole_survey(fresh.block, 1, fresh.inputs, fresh.architecture)["mlp.down_proj"]
    matrix = fresh.block.mlp.down_proj.weight.clone()
    ranked = sorted(range(64), key=lambda channel: -found.largest[channel].item())
    dealt = [ranked[place] for group in range(4) for place in range(group, 64, 4)]
    orders = {AS_IT_IS: list(range(64)), "Sequential": ranked, "Transpose": dealt}
    losses = {name: _rounding_loss(matrix[:, order], found.hessian[order][:, order]) for name, order in orders.items()}
    report = _prepare(fresh, "g128", reorder={"strategy": "GridSearch"}, enable_smooth=False)
    chosen = report["reorder"]["mlp.down_proj"]
    assert losses[chosen] <= 1.001 * min(losses.values())
    assert torch.equal(fresh.block.mlp.down_proj.weight, matrix[:, orders[chosen]])
    assert loud == 1.0 or chosen != AS_IT_IS


def test_factors_by_hand():
    first, second = torch.tensor([4.0, 1.0, 0.0, 9.0, 16.0]), torch.tensor([1.0, 4.0, 1.0, 0.0, 2.0])
    assert smoothing_factors(first, second, 0.5, 0.0).tolist() == [2.0, 1.0, 1.0, 1.0, 4.0]
    assert smoothing_factors(first, second, 0.0, 0.5).tolist() == pytest.approx([1.0, 0.5, 1.0, 1.0, 1 / math.sqrt(2)])
    assert smoothing_factors(first, second, 0.0, 0.0).tolist() == [1.0] * 5
    wild = smoothing_factors(torch.tensor([torch.nan, torch.inf, 1e-30]), torch.ones(3), 1.0, 0.0)
    assert wild.tolist() == pytest.approx([1.0, 1.0, 1e-5])


def test_a_channel_that_shows_nothing_keeps_its_weights(tmp_path):
    fresh = _fresh(tmp_path / "m")
    fresh.block.mlp.up_proj.weight[7] = 0.0
    fresh.block.mlp.down_proj.weight[:, 9] = 0.0
    original = copy.deepcopy(fresh.block.state_dict())
    _prepare(fresh, "gchn")
    now = fresh.block.state_dict()
    assert torch.equal(now["mlp.down_proj.weight"][:, 7], original["mlp.down_proj.weight"][:, 7])
    assert torch.equal(now["mlp.up_proj.weight"][9], original["mlp.up_proj.weight"][9])
    assert all(torch.isfinite(tensor).all() for tensor in now.values())
