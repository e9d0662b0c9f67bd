import math
from dataclasses import replace

import pytest
import torch

from algorithms.numerics.column_sweep import inverse_factor, quadratic_loss, refine, sweep
from algorithms.numerics.sparse_columns import SparseColumns, SparseSettings, leave_one_out_gain, saliency_scale
from algorithms.numerics.two_level import quantize_statistics
from tests.support.matrices import problem

PLAIN = SparseSettings(bits=3, group_size=16)
SETTINGS = {
    "asymmetric": PLAIN,
    "symmetric": replace(PLAIN, symmetric=True),
    "whole zeros": replace(PLAIN, round_zero=True),
    "two bits": replace(PLAIN, bits=2),
}
TWO_LEVELS = replace(PLAIN, scale_bits=3, zero_bits=3)


def _groups(kind, rows=30, width=16):
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(width, rows, generator=generator) * 0.05
    if kind == "duplicates":
        columns = (columns * 40).round() / 40
    if kind == "constant":
        columns[:, ::3] = columns[:1, ::3]
        columns[:, 1] = 0.0
    if kind == "one sign":
        columns = columns.abs() + 0.1
    if kind == "an outlier":
        columns[-1] += 2.0
    return columns, torch.rand(width, generator=generator) + 0.5


def _rounded(column, low, high, settings):
    """A column [g] on the grid of a range, in float64 and one code at a time."""
    scale, zero = (part.double() for part in settings.grid(low, high))
    codes = [min(max(round((value / scale + zero).item()), 0), settings.top) for value in column.double()]
    return scale * (torch.tensor(codes, dtype=torch.float64) - zero)


def _brute_gain(column, pivots, settings):
    """What leaving each weight in turn out of the grid saves, refitting the grid every time."""

    def errors(others):
        return ((_rounded(column, others.min(), others.max(), settings) - column.double()) / pivots.double()).square()

    places = torch.arange(len(column))
    total = errors(column).sum()
    return torch.stack([total - errors(column[places != left])[places != left].sum() for left in places])


@pytest.mark.parametrize("kind", ["plain", "duplicates", "constant", "one sign", "an outlier"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("width", [16, 2, 5])
def test_leaving_one_out_is_refitting_without_it(name, kind, width):
    settings = replace(SETTINGS[name], group_size=width)
    columns, pivots = _groups(kind, width=width)
    found = leave_one_out_gain(columns, pivots, settings).double()
    expected = torch.stack([_brute_gain(column, pivots, settings) for column in columns.T], 1)
    # A value on the edge between two codes may round either way in float32.
    off = (found - expected).abs() > 1e-6 + 1e-4 * expected.abs()
    assert off.any(0).sum() <= (2 if kind == "duplicates" else 0)


def test_nothing_is_left_of_a_group_of_one():
    columns, pivots = _groups("plain", width=1)
    gains = leave_one_out_gain(columns, pivots, replace(PLAIN, group_size=1))
    assert gains.shape == columns.shape
    assert gains.abs().max() < 1e-6


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["plain", "one sign", "constant", "an outlier"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_grid_holds_every_weight_of_its_group_to_its_own_step(name, kind, sign):
    settings, columns = SETTINGS[name], sign * _groups(kind)[0]
    scales, zeros = settings.grid(columns.amin(0), columns.amax(0))
    codes = torch.round(columns / scales + zeros).clamp(0, settings.top)
    # Whole zeros move the ends of the grid by up to half a step.
    most = 1.01 if settings.round_zero else 0.51
    assert (((codes - zeros) * scales - columns).abs() <= most * scales).all()
    if settings.round_zero:
        assert torch.equal(zeros, zeros.round())
        assert zeros.min() >= 1
        assert zeros.max() <= settings.top
    if settings.symmetric:
        assert (zeros == 2 ** (settings.bits - 1)).all()


def test_the_scale_of_thresholds_by_formula():
    columns, pivots = _groups("plain", rows=9, width=6)
    expected = 0.0
    for column, pivot in zip(columns.tolist(), pivots.tolist(), strict=True):
        mean = sum(column) / 9
        expected += sum((value - mean) ** 2 for value in column) / 8 / pivot**2 / 6
    assert saliency_scale(columns, pivots).item() == pytest.approx(expected, rel=1e-5)


def _swept(settings, *, threshold=0.2, rows=40, width=96, ordered=True, passes=0, scaled=1.0, seed=0):
    matrix, hessian = problem(rows, width, seed=seed)
    matrix *= 0.05 * scaled
    order = torch.argsort(hessian.diagonal(), descending=True) if ordered else None
    factor = inverse_factor(hessian, 0.01, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    limit = threshold * saliency_scale(columns, factor.pivots)
    quantizer = SparseColumns(width, settings, limit.expand(rows).clone(), order)
    result = sweep(columns, factor, quantizer)
    for _ in range(passes):
        refine(columns, result, factor.hessian, quantizer)
    back = torch.empty_like(result)
    back[torch.arange(width) if order is None else order] = result
    return columns, factor, quantizer, result, back.T


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        TWO_LEVELS,
        replace(TWO_LEVELS, symmetric=True),
        replace(TWO_LEVELS, round_zero=True),
        replace(TWO_LEVELS, zero_bits=2, round_zero=True),
        replace(TWO_LEVELS, zero_bits=None, run=7),
        replace(TWO_LEVELS, scale_bits=None, zero_symmetric=True),
        replace(PLAIN, per_channel=False, leave_one_out=False),
        replace(PLAIN, group_size=96),
    ],
)
def test_what_is_kept_is_what_the_sweep_returned(settings, passes, ordered):
    _, _, quantizer, result, expected = _swept(settings, passes=passes, ordered=ordered)
    weight = quantizer.result()
    torch.testing.assert_close(weight.dequantize(), expected, atol=1e-6, rtol=1e-6)
    # Where there is an outlier, its own value stands, to the last bit of float16.
    mask = quantizer.outliers
    assert 0 < mask.sum() < 0.2 * mask.numel()
    assert torch.equal(result[mask], result[mask].half().float())
    assert torch.equal(weight.outliers.values, result.T[mask.T])
    assert weight.group_size == settings.group_size
    assert weight.codes.max() <= settings.top
    if settings.per_channel and settings.run == 16:
        rows = [slice(0, 16), slice(16, 32), slice(32, 40)]
        torch.testing.assert_close(torch.cat([quantizer.result(part).dequantize() for part in rows]), weight.dequantize())


def test_outliers_are_the_compensated_weights_in_float16():
    columns, factor, quantizer, result, _ = _swept(PLAIN)
    work, upper = columns.double().clone(), factor.upper.double()
    for place in range(columns.shape[0]):
        found = quantizer.outliers[place]
        torch.testing.assert_close(result[place][found].double(), work[place][found], rtol=2**-10, atol=1e-6)
        work[place + 1 :] -= torch.outer(
            upper[place, place + 1 :], (work[place] - result[place].double()) / upper[place, place]
        )


def test_what_costs_more_than_the_threshold_is_an_outlier_and_nothing_else():
    columns, factor, quantizer, result, _ = _swept(replace(PLAIN, leave_one_out=False))
    limit = 0.2 * saliency_scale(columns, factor.pivots).double()
    work, upper = columns.double().clone(), factor.upper.double()
    agreed = 0
    for place in range(columns.shape[0]):
        if place % 16 == 0:
            low, high = work[place : place + 16].amin(0), work[place : place + 16].amax(0)
            scales, zeros = (part.double() for part in PLAIN.grid(low.float(), high.float()))
            scales, zeros = scales.half().double(), zeros.half().double()
        rounded = scales * (torch.round(work[place] / scales + zeros).clamp(0, 7) - zeros)
        expected = ((rounded - work[place]) / upper[place, place]).square() > limit
        agreed += (expected == quantizer.outliers[place]).sum().item()
        work[place + 1 :] -= torch.outer(
            upper[place, place + 1 :], (work[place] - result[place].double()) / upper[place, place]
        )
    assert agreed >= columns.numel() - 2


def test_the_code_under_an_outlier_is_that_of_zero():
    _, _, quantizer, _, _ = _swept(TWO_LEVELS)
    weight = quantizer.result()
    bare = replace(
        weight, outliers=type(weight.outliers).of(torch.zeros(40, 96, dtype=torch.bool), torch.zeros(40, 96)), order=None
    )
    rows, places = weight.outliers.rows, weight.outliers.columns.long()
    scales, zeros = (part.decode()[rows, places // 16] for part in (weight.scales, weight.zeros))
    grid = scales[:, None] * (torch.arange(8) - zeros[:, None])
    torch.testing.assert_close(bare.dequantize()[rows, places].abs(), grid.abs().amin(1), atol=1e-7, rtol=1e-5)


def test_a_group_is_fitted_without_its_likely_outliers():
    columns, pivots = _groups("an outlier")
    # Below what the outlier of each row gains, and above what anything else does.
    gains = leave_one_out_gain(columns, torch.ones_like(pivots), PLAIN)
    thresholds = (gains[-1] + gains[:-1].amax(0)) / 2
    assert (gains[-1] > thresholds).all()
    quantizer = SparseColumns(16, PLAIN, thresholds, None)
    sweep_result = sweep(columns, None, quantizer)
    others = columns[:-1]
    scales, zeros = PLAIN.grid(others.amin(0), others.amax(0))
    weight = quantizer.result()
    torch.testing.assert_close(weight.scales.decode()[:, 0], scales.half().float())
    torch.testing.assert_close(weight.zeros.decode()[:, 0], zeros.half().float())
    assert torch.equal(sweep_result[-1], columns[-1].half().float())


def test_an_infinite_threshold_leaves_no_outliers():
    _, _, quantizer, _, expected = _swept(TWO_LEVELS, threshold=math.inf)
    weight = quantizer.result()
    assert weight.outliers.values.numel() == 0
    assert weight.outliers.offsets.tolist() == [0] * 41
    torch.testing.assert_close(weight.dequantize(), expected, atol=1e-6, rtol=1e-6)


def test_only_rows_with_a_finite_threshold_have_outliers():
    matrix, hessian = problem(32, 64)
    factor, columns = inverse_factor(hessian, 0.01), matrix.T.contiguous()
    limits = torch.full((32,), math.inf)
    limits[:16] = 0.1 * saliency_scale(columns, factor.pivots)
    quantizer = SparseColumns(64, TWO_LEVELS, limits, None)
    result = sweep(columns, factor, quantizer)
    assert quantizer.outliers[:, :16].any()
    assert not quantizer.outliers[:, 16:].any()
    plain = sweep(columns, factor, SparseColumns(64, TWO_LEVELS, torch.full((32,), math.inf), None))
    assert torch.equal(result[:, 16:], plain[:, 16:])


def test_refining_lowers_the_loss_and_keeps_the_outliers():
    columns, factor, quantizer, result, _ = _swept(TWO_LEVELS)
    before, mask = quadratic_loss(columns, result, factor.hessian), quantizer.outliers.clone()
    refine(columns, result, factor.hessian, quantizer)
    assert quadratic_loss(columns, result, factor.hessian) < 0.98 * before
    assert torch.equal(quantizer.outliers, mask)


def test_statistics_are_those_of_the_second_level():
    columns, _ = _groups("plain", rows=32)
    quantizer = SparseColumns(16, TWO_LEVELS, torch.full((32,), math.inf), None)
    sweep(columns, None, quantizer)
    scales, zeros = TWO_LEVELS.grid(columns.amin(0), columns.amax(0))
    weight = quantizer.result()
    for found, values in ((weight.scales, scales), (weight.zeros, zeros)):
        assert torch.equal(found.decode(), quantize_statistics(values, bits=3, run=16).decode())


@pytest.mark.parametrize("settings", [PLAIN, TWO_LEVELS, replace(PLAIN, round_zero=True), replace(PLAIN, symmetric=True)])
@pytest.mark.parametrize("offset", [0.0, 3.0, 500.0])
def test_weights_whose_spread_is_tiny_beside_them_stay_close(settings, offset):
    columns = offset + 1e-3 * torch.randn(32, 20, generator=torch.Generator().manual_seed(2))
    quantizer = SparseColumns(32, settings, torch.full((20,), math.inf), None)
    sweep(columns, None, quantizer)
    weight = quantizer.result().dequantize().T
    assert torch.isfinite(weight).all()
    # Grids that hold zero have steps of a seventh of the value; the second level quantizes zeros that are far off.
    share = 1 / 6 if settings.round_zero or settings.symmetric or settings.scale_bits is not None else 1 / 1000
    assert (weight - columns).abs().max() <= share * offset + 1e-3
