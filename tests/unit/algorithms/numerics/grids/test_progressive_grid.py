"""Group grids in whole multiples of their rows', against every scale and zero there is, in float64 and plain loops."""

import pytest
import torch

from algorithms.numerics.grids.progressive_grid import PROTECTIVE, ProgressiveGrid, fit_progressive, row_scales
from algorithms.numerics.grids.uniform_sweep import SweepSettings
from algorithms.numerics.uniform import SMALLEST_SCALE, Grid, RangeSearch
from tests.support.matrices import problem

EVERYTHING = RangeSearch(factors=(1e-3, 1.0, 1e3))
HALF = RangeSearch(factors=(1.0, 0.5))


def _matrix(kind, rows=24, columns=64):
    generator = torch.Generator().manual_seed(len(kind))
    matrix = torch.randn(rows, columns, generator=generator)
    if kind == "heavy":
        return matrix * torch.exp(torch.randn(rows, columns, generator=generator))
    return matrix.abs() if kind == "positive" else matrix


def _errors(columns, row_scales, weights, scales, zeros, bits):
    """Weighted squared errors [O], in units of the row's grid, float64."""
    wanted = columns.double() / row_scales.double()
    steps = (wanted / scales + zeros).round().clamp(0, (1 << bits) - 1) - zeros
    return weights.double() @ (steps * scales - wanted).square()


def _legal(bits):
    """Every scale and zero for which all codes stand for integers of 8 bits."""
    top = (1 << bits) - 1
    return [(s, z) for s in range(1, 257) for z in range(top + 1) if -s * z >= -128 and s * (top - z) <= 127]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy", "positive"])
def test_a_grid_is_nearly_the_best_there_is(bits, kind):
    matrix = _matrix(kind)
    rows, columns = row_scales(matrix, bits), matrix[:, :32].T
    weights = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.2
    best = torch.stack([_errors(columns, rows, weights, s, z, bits) for s, z in _legal(bits)]).amin(0)
    found = []
    for search in (EVERYTHING, HALF, None):
        scales, zeros = ProgressiveGrid(row_scales=rows, bits=bits, search=search).fit(columns, weights)
        found.append(_errors(columns, rows, weights, (scales / rows).round().double(), zeros.double(), bits))
        assert torch.all(found[-1] >= best * (1 - 1e-6))
    assert torch.all(found[0] <= found[1] * (1 + 1e-5))
    assert torch.all(found[1] <= found[2] * (1 + 1e-5))
    # Zeros follow from the range and are not searched for, which costs little.
    assert found[0].sum() < 1.1 * best.sum()
    assert found[2].sum() < (1.5 if bits == 2 else 1.2) * best.sum()


@pytest.mark.parametrize("bits", [3, 4])
def test_of_two_scales_beside_the_range_the_better_is_taken(bits):
    matrix, top = _matrix("normal"), (1 << bits) - 1
    rows, columns, weights = row_scales(matrix, bits), matrix[:, 16:48].T, torch.linspace(0.5, 2, 32)
    scales, zeros = ProgressiveGrid(row_scales=rows, bits=bits).fit(columns, weights)
    legal = set(_legal(bits))
    for row in range(matrix.shape[0]):
        inside = [(columns[place, row].double() / rows[row].double()).item() for place in range(32)]
        low, high = min(*inside, 0.0), max(*inside, 0.0)
        span = (high - low) / top
        tried = {}
        for scale in {int(span), int(span) + 1} - {0}:
            least = next((z for z in range(top + 1) if (scale, z) in legal), None)
            if least is None:
                continue
            most = max(z for z in range(top + 1) if (scale, z) in legal)
            zero = min(max(round(-low / span), least), most)
            steps = [min(max(round(value / scale + zero), 0), top) - zero for value in inside]
            tried[scale, zero] = sum(w * (s * scale - v) ** 2 for w, s, v in zip(weights.tolist(), steps, inside, strict=True))
        best = min(tried, key=tried.get)
        assert ((scales[row] / rows[row]).round().item(), zeros[row].item()) == best
        assert scales[row] == rows[row] * best[0]


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_code_of_any_grid_leaves_eight_bits(bits):
    generator = torch.Generator().manual_seed(bits)
    columns = torch.randn(8, 2000, generator=generator) * torch.exp(3 * torch.randn(2000, generator=generator))
    columns[:, :200] = columns[:, :200].abs()
    columns[:, 200:400] = -columns[:, 200:400].abs()
    rows = torch.rand(2000, generator=generator) + 0.01  # the numbers are far beyond what these were made for
    scales, zeros = ProgressiveGrid(row_scales=rows, bits=bits, search=EVERYTHING).fit(columns, torch.ones(8))
    whole, top = (scales / rows).round(), (1 << bits) - 1
    assert set(zip(whole.tolist(), zeros.tolist(), strict=True)) <= set(_legal(bits))
    assert len(whole.unique()) >= min(4, len({scale for scale, _ in _legal(bits)}))
    assert (-whole * zeros).min() >= -128
    assert (whole * (top - zeros)).max() <= 127


def test_the_protective_table_is_the_published_one():
    assert PROTECTIVE == {2: 96, 3: 111, 4: 119, 5: 123, 6: 125, 7: 126, 8: 127}
    matrix = _matrix("heavy")
    for bits, largest in PROTECTIVE.items():
        scales = row_scales(matrix, bits)
        assert torch.equal(scales, scales.half().float())
        torch.testing.assert_close(matrix.abs().amax(1) / scales, torch.full((24,), float(largest)), rtol=2**-10, atol=0)
        # Rounded to a scale of s, a number of at most this size stays within 8 bits; by hand, the largest error is s / 2.
        steps = [round(largest / scale) * scale for scale, zero in _legal(bits) if round(largest / scale) + zero < 1 << bits]
        assert max(steps) <= 127


@pytest.mark.parametrize("search", [None, HALF])
@pytest.mark.parametrize(("bits", "act_order"), [(4, True), (4, False), (3, True), (8, True)])
def test_the_intermediate_stays_in_eight_bits_under_wild_hessians(bits, act_order, search):
    matrix, hessian = problem(40, 64, tokens=20)  # of a third of the directions nothing is known
    matrix[:3] *= 1e4
    matrix[3] = matrix[3].abs()
    matrix[4, 1:] = 0
    wild = hessian * torch.logspace(-6, 6, 64)[:, None] * torch.logspace(-6, 6, 64)
    grid = Grid(bits=bits, symmetric=False, search=search)
    settings = SweepSettings(grid=grid, group_size=16, act_order=act_order, damping=1e-9)
    codes = fit_progressive({"a": matrix[:24], "b": matrix[24:]}, wild, settings)
    for name, part in (("a", matrix[:24]), ("b", matrix[24:])):
        integers = codes[name].intermediate()
        assert integers.min() >= -128
        assert integers.max() <= 127
        assert torch.isfinite(codes[name].dequantize()).all()
        assert torch.equal(codes[name].row_scales, row_scales(part, bits))
        assert int(codes[name].codes.max()) < 1 << bits
        assert codes[name].group_scales.min() >= 1
    plain = fit_progressive({"a": matrix}, None, settings)["a"]
    moved = torch.cat([codes[name].codes for name in "ab"]) != plain.codes
    assert moved.float().mean() > 0.05  # the sweep has had something to spread


def test_the_sweep_loses_less_than_rounding_and_two_levels_cost_little():
    matrix, hessian = problem(48, 128)
    settings = SweepSettings(grid=Grid(bits=4, symmetric=False), group_size=32)

    def _loss(codes):
        difference = (codes["w"].dequantize() - matrix).double()
        return ((difference @ hessian.double()) * difference).sum().item()

    swept, rounded = (_loss(fit_progressive({"w": matrix}, metric, settings)) for metric in (hessian, None))
    assert swept < 0.6 * rounded


def test_rows_that_say_nothing_are_coded_as_nothing():
    matrix = torch.zeros(3, 32)
    matrix[1, 5] = 1e-12
    matrix[2] = 0.25
    codes = fit_progressive({"w": matrix}, torch.eye(32), SweepSettings(grid=Grid(bits=4, symmetric=False), group_size=16))["w"]
    found = codes.dequantize()
    assert torch.equal(found[:2], torch.zeros(2, 32))
    assert codes.row_scales[:2].tolist() == [SMALLEST_SCALE] * 2
    # 15 steps of 8 are 120, where the number itself is 119.
    assert codes.codes[2].tolist() == [15] * 32
    assert (codes.group_scales[2].tolist(), codes.zeros[2].tolist()) == ([8, 8], [0, 0])
    torch.testing.assert_close(found[2], matrix[2] * 120 / 119, rtol=1e-3, atol=0)
