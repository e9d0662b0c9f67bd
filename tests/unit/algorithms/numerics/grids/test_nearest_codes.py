"""Codes of whole matrices against every code of every group, tried one by one in float64."""

import pytest
import torch

from algorithms.numerics.grids import nearest_codes as module
from algorithms.numerics.grids.nearest_codes import nearest_codes
from algorithms.numerics.grids.uniform_sweep import SweepSettings, fit_uniform
from algorithms.numerics.uniform import SMALLEST_SCALE, Grid, RangeSearch
from tests.support.matrices import problem

FACTORS = (1.0, 0.85, 0.7, 0.55)


def _grid(**changes):
    return Grid(**{"bits": 2, "symmetric": False, "search": RangeSearch(factors=FACTORS), **changes})


def _brute(values, metric, grid):
    """Codes [g] and the error of a group's weights [g], over all ranges and, weight by weight, all codes."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    full, zeros = grid.full(low[None].float(), high[None].float())
    best = None
    for factor in grid.search.factors if grid.search is not None else (1.0,):
        scale, zero = grid.stored(full * factor).double().item(), zeros.double().item()
        levels = scale * (torch.arange(1 << grid.bits, dtype=torch.float64) - zero)
        codes = (values[:, None] - levels).abs().argmin(1)
        difference = levels[codes] - values
        error = (difference @ metric @ difference).item()
        if best is None or error < best[1]:
            best = codes, error
    return best


def _assert_best(matrix, found, metric, group_size, grid, measured=None):
    measured = measured or group_size
    for row in range(matrix.shape[0]):
        for group in range(matrix.shape[1] // group_size):
            columns = slice(group * group_size, (group + 1) * group_size)
            block = torch.block_diag(*(part[:, at : at + measured] for at, part in _runs(metric, columns, measured)))
            codes, error = _brute(matrix[row, columns].double(), block, grid)
            difference = (found.dequantize()[row, columns] - matrix[row, columns]).double()
            assert (difference @ block @ difference).item() == pytest.approx(error, rel=1e-4)
            assert (found.codes[row, columns] == codes).double().mean() > 0.9  # two ranges may cost the same but for rounding


def _runs(metric, columns, measured):
    return [(at, metric[at : at + measured].double()) for at in range(columns.start, columns.stop, measured)]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [4, 12])
@pytest.mark.parametrize("measures", [True, False])
def test_no_range_and_no_code_is_better(bits, symmetric, group_size, measures):
    matrix, hessian = problem(6, 12, seed=bits)
    grid = _grid(bits=bits, symmetric=symmetric)
    found = nearest_codes(matrix, group_size=group_size, grid=grid, metric=hessian if measures else None)
    assert found.group_size == group_size
    _assert_best(matrix, found, hessian if measures else torch.eye(12), group_size, grid)


def test_ranges_are_measured_with_what_other_columns_do():
    matrix, hessian = problem(64, 16, seed=3)
    blind, seeing = (nearest_codes(matrix, group_size=16, grid=_grid(), metric=metric) for metric in (None, hessian))
    errors = [torch.sum(((part.dequantize() - matrix) @ hessian) * (part.dequantize() - matrix)) for part in (blind, seeing)]
    assert errors[1] < 0.95 * errors[0]


def test_wide_groups_are_measured_in_runs(monkeypatch):
    monkeypatch.setattr(module, "_MEASURED", 5)
    matrix, hessian = problem(5, 24, seed=4)
    found = nearest_codes(matrix, group_size=12, grid=_grid(), metric=hessian)
    _assert_best(matrix, found, hessian, 12, _grid(), measured=4)


@pytest.mark.parametrize("elements", [1, 100, 1 << 20])
def test_rows_do_not_know_of_each_other(monkeypatch, elements):
    matrix, hessian = problem(7, 32, seed=5)
    alone = [nearest_codes(row[None], group_size=8, grid=_grid(), metric=hessian) for row in matrix]
    monkeypatch.setattr(module, "_ELEMENTS", elements)
    found = nearest_codes(matrix, group_size=8, grid=_grid(), metric=hessian)
    assert torch.equal(found.codes, torch.cat([part.codes for part in alone]))
    assert torch.equal(found.scales, torch.cat([part.scales for part in alone]))


@pytest.mark.parametrize("search", [None, RangeSearch(), RangeSearch(degree=2.4)])
@pytest.mark.parametrize("group_size", [16, 48])
def test_it_is_the_sweep_without_a_hessian(search, group_size):
    matrix, _ = problem(9, 48, seed=6)
    grid = _grid(bits=3, search=search)
    (expected,) = fit_uniform({"w": matrix}, None, SweepSettings(grid=grid, group_size=group_size)).values()
    found = nearest_codes(matrix, group_size=group_size, grid=grid)
    torch.testing.assert_close(found.dequantize(), expected.dequantize())
    assert torch.equal(found.zeros, expected.zeros)


def test_a_group_of_zeros_and_one_without_negative_numbers():
    matrix = torch.tensor([[0.0, 0.0, 0.0, 1.0, 2.0, 3.0]])
    found = nearest_codes(matrix, group_size=3, grid=_grid(search=None), metric=torch.eye(6))
    assert found.scales[0, 0] == SMALLEST_SCALE
    assert found.dequantize()[0, :3].tolist() == [0.0, 0.0, 0.0]
    # A zero of 0 is left out: codes 1 to 3 stand for 0 to the largest weight in two steps of 1.5.
    assert found.dequantize()[0, 3:].tolist() == [1.5, 1.5, 3.0]
    assert found.zeros.tolist()[0][1] == 1.0
