"""Which codes a setting comes to, linear by linear, and calibrations on several ranks beside those of one process."""

import pytest
import torch
from safetensors.torch import load_file

from algorithms.modeling.families.table import architecture_for
from algorithms.modeling.source import ModelSource
from algorithms.numerics.grids.nearest_codes import nearest_codes
from algorithms.numerics.grids.progressive_grid import fit_progressive
from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform
from algorithms.numerics.spread import WHOLE
from algorithms.numerics.statistics import InputStatistics
from algorithms.numerics.uniform import Grid, RangeSearch
from algorithms.parallel.ranks import ALONE
from algorithms.quantization.lmquant.calibration import Coder
from algorithms.quantization.lmquant.pipelines import cache_ranges
from tests.support.models import confident, save_family
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.quantization.lmquant.recipes import algorithm
from tests.unit.algorithms.quantization.plugin_runs import blocks, calibrate

LLAMA = architecture_for("llama")
SEARCH = {"enable_calib_range": True, "calib_range": {"strategy": "GridSearch", "num_grids": 4, "max_shrink": 0.5}}
FACTORS = (1.0, 0.875, 0.75, 0.625, 0.5)


@pytest.fixture(scope="module")
def given():
    """A matrix, and statistics of inputs that are far from independent."""
    generator = torch.Generator().manual_seed(0)
    statistics = InputStatistics(64)
    statistics.update(torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    return torch.randn(24, 64, generator=generator), statistics


def _coded(preset, given, name="mlp.down_proj", **wgts):
    matrix, statistics = given
    plugin = algorithm(preset, quant={"wgts": wgts})
    coder = Coder(plugin.config.settings)
    fit = coder.fit_progressive if preset == "g128" else coder.fit_uniform
    return fit({name: matrix}, statistics, WHOLE, architecture=LLAMA)[name]


def _assert_same(found, expected):
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantize(), expected.dequantize())


def test_symmetric_groups_by_the_sweep(given):
    matrix, statistics = given
    grid = Grid(bits=4, symmetric=True, search=RangeSearch(factors=FACTORS))
    expected = fit_uniform({"w": matrix}, statistics.hessian(), SweepSettings(grid=grid, group_size=16))["w"]
    _assert_same(_coded("w4a8kv4_sym", given, **SEARCH), expected)


def test_progressive_groups_by_the_sweep(given):
    matrix, statistics = given
    for keys, search in ((SEARCH, RangeSearch(factors=FACTORS)), ({"enable_calib_range": False}, None)):
        settings = SweepSettings(grid=Grid(bits=4, symmetric=False, search=search), group_size=16, damping=0.02)
        damped = {"calib_kernel": {"gptq": {"damp_percentage": 0.02}}}
        expected = fit_progressive({"w": matrix}, statistics.hessian(), settings)["w"]
        _assert_same(_coded("g128", given, **keys, **damped), expected)


def test_rows_with_zeros_have_products_that_float16_holds(given):
    found = _coded("gchn", given)
    products = found.scales * found.zeros
    assert torch.equal(products, products.half().float())
    assert not torch.equal(found.zeros, torch.full_like(found.zeros, 8.0))
    symmetric = _coded("gchn_kv8", given)
    assert torch.equal(symmetric.zeros, torch.full_like(symmetric.zeros, 8.0))


@pytest.mark.parametrize(("name", "sweeps"), [("self_attn.k_proj", False), ("self_attn.o_proj", True), ("mlp.up_proj", True)])
def test_linears_without_the_kernel_are_rounded_to_nearest(given, name, sweeps):
    kernel = {"calib_kernel": {"gptq": {"include_proj_qkv": False}}}
    swept = _coded("w4a8kv4_sym", given, name, enable_calib_range=False)
    found = _coded("w4a8kv4_sym", given, name, **kernel, enable_calib_range=False)
    nearest = nearest_codes(given[0], group_size=16, grid=Grid(bits=4, symmetric=True))
    _assert_same(found, swept if sweeps else nearest)
    assert not torch.equal(swept.codes, nearest.codes)


@pytest.mark.parametrize("objective", ["OutputsError", "ProductsError", "TensorError"])
def test_ranges_are_compared_as_the_objective_says(given, objective):
    matrix, statistics = given
    search = {**SEARCH, "calib_range": {**SEARCH["calib_range"], "objective": objective}}
    found = _coded("w4a8kv4_sym", given, enable_calib_kernel=False, **search)
    hessian = statistics.hessian().double()
    for row in range(0, 24, 5):
        for group in range(4):
            part = slice(16 * group, 16 * group + 16)
            values, losses = matrix[row, part].double(), {}
            for factor in FACTORS:
                step = torch.tensor(values.abs().max().item() * 2 / 15 * factor).half().item()
                error = (values / step).round().clamp(-8, 7) * step - values
                metric = torch.eye(16).double() if objective == "TensorError" else hessian[part, part]
                losses[step] = (error @ metric @ error).item()
            assert losses[found.scales[row, group].item()] <= 1.001 * min(losses.values())


def test_linears_may_be_left_out_of_the_search(given):
    skip = {"calib_range": {**SEARCH["calib_range"], "skip_proj_1st": True}, "enable_calib_range": True}
    for name, searched in (("mlp.gate_proj", False), ("mlp.down_proj", True)):
        found = _coded("w4a8kv4_sym", given, name, **skip)
        plain = _coded("w4a8kv4_sym", given, name, enable_calib_range=False)
        assert torch.equal(found.scales, plain.scales) is not searched


# Exponents and orders by comparison, which ranks have to agree on; and ranges of which each of them has seen a part.
SEARCHED = {"strategy": "GridSearch", "num_grids": 4}
SHARED = [
    ("g128", {"size": 4, "quant": {"reorder": {"strategy": "GridSearch"}, "smooth": {"xw": SEARCHED}}}, 2),
    ("gchn", {"nsamples": 3, "val_size": 1}, 3),  # of two sequences, for three ranks
    ("sq_static", {"nsamples": 3, "val_size": 1}, 3),
]


def _calibrate(ranks, preset, changes, model, folder):
    return calibrate(algorithm(preset, **changes), ModelSource(model), folder, ranks=ranks)


@pytest.mark.parametrize(("preset", "changes", "size"), SHARED)
def test_ranks_choose_alike_and_find_the_codes_of_one_process(tmp_path, preset, changes, size):
    model = confident(save_family(tmp_path / "base", "llama"))
    one = _calibrate(ALONE, preset, changes, model, tmp_path / "one")
    several = run_on_ranks(_calibrate, size, preset, changes, model, tmp_path / "several")
    assert several == several[:1] * len(several)
    for key in {"reorder", "smooth_xw", "smooth_yx"} & {
        key for key in ("reorder", "smooth_xw", "smooth_yx") if preset == "g128"
    }:
        assert blocks(several[0], key)[0] == blocks(one, key)[0]
    first, second = (load_file(artifact.directory / "0.safetensors") for artifact in (one, several[0]))
    assert first.keys() == second.keys()
    plugin = algorithm(preset, **changes)
    dense = [plugin.load(artifact).model.layers[0].self_attn.state_dict() for artifact in (one, several[0])]
    same = [torch.isclose(dense[0][name], dense[1][name], rtol=1e-3, atol=1e-6) for name in dense[0]]
    assert torch.cat([part.double().flatten() for part in same]).mean() > 0.95
    if preset == "sq_static":
        assert cache_ranges(several[0])[0] == pytest.approx(cache_ranges(one)[0], rel=1e-5)
