import pytest
import torch

from algorithms.numerics.column_sweep import inverse_factor, quadratic_loss, refine, sweep
from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform, row_places
from algorithms.numerics.uniform import Grid, RangeSearch, UniformColumns
from tests.support.matrices import problem

GRID = Grid(bits=3, symmetric=False, search=RangeSearch())


def _error(weight, matrix, hessian):
    return quadratic_loss(matrix.T, weight.dequantize().T, hessian)


def test_places_of_a_stack():
    assert row_places({"q": torch.empty(4, 2), "k": torch.empty(1, 2), "v": torch.empty(3, 2)}) == {
        "q": (0, 4),
        "k": (4, 5),
        "v": (5, 8),
    }


@pytest.mark.parametrize("group_size", [8, -1])
def test_in_the_model_s_order_it_is_sweep_and_refinement(group_size):
    matrix, hessian = problem(10, 32, seed=1)
    wide = 32 if group_size == -1 else group_size
    settings = SweepSettings(grid=GRID, group_size=group_size, act_order=False, refinements=2)
    found = fit_uniform({"a": matrix[:4], "b": matrix[4:]}, hessian, settings)
    columns, factor = matrix.T.contiguous(), inverse_factor(hessian, 0.01)
    quantizer = UniformColumns(32, group_size=wide, grid=GRID)
    quantizer.fix_groups(columns, factor.pivots)
    result = sweep(columns, factor, quantizer)
    for _ in range(2):
        refine(columns, result, factor.hessian, quantizer)
    torch.testing.assert_close(torch.cat([found[name].dequantize() for name in "ab"]), result.T)
    assert found["a"].scales.shape == (4, 32 // wide)


@pytest.mark.parametrize("static", [True, False])
def test_the_loudest_columns_come_first_and_the_result_is_in_the_model_s_order(static):
    matrix, hessian = problem(24, 32, seed=2)
    places = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    settings = SweepSettings(grid=GRID, group_size=8, static_groups=static)
    found = fit_uniform({"w": matrix[:, places]}, hessian[places][:, places], settings)["w"]
    assert (found.groups is None) is static
    order = torch.argsort(hessian[places][:, places].diagonal(), descending=True)
    if not static:
        assert found.groups[order].tolist() == [place // 8 for place in range(32)]
    ordered = _error(found, matrix[:, places], hessian[places][:, places])
    rounded = fit_uniform({"w": matrix[:, places]}, None, settings)["w"]
    assert ordered < 0.5 * _error(rounded, matrix[:, places], hessian[places][:, places])


def test_without_a_hessian_every_weight_has_its_nearest_code():
    matrix, _ = problem(6, 24, seed=3)
    found = fit_uniform({"w": matrix}, None, SweepSettings(grid=GRID, group_size=6))["w"]
    levels = torch.arange(8)[None, None] - found.zeros[:, :, None]
    values = (found.scales[:, :, None] * levels).repeat_interleave(6, dim=1).double()
    nearest = (values - matrix[:, :, None].double()).abs().amin(-1)
    torch.testing.assert_close((found.dequantize() - matrix).abs().double(), nearest, rtol=1e-4, atol=1e-6)


def test_refinements_lower_the_error():
    matrix, hessian = problem(16, 32, seed=4)
    losses = [
        _error(fit_uniform({"w": matrix}, hessian, SweepSettings(grid=GRID, group_size=8, refinements=n))["w"], matrix, hessian)
        for n in range(3)
    ]
    assert losses[0] > losses[1] >= losses[2]
