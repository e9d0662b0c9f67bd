import pytest
import torch

from algorithms.numerics.column_sweep import inverse_factor, refine, sweep
from algorithms.numerics.uniform import SMALLEST_SCALE, Grid, RangeSearch, UniformCodes, UniformColumns, fit_grid, stored_scales
from tests.support.matrices import problem


def _columns(rows=40, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, rows, generator=generator) * 0.05, torch.rand(width, generator=generator) + 0.1


def _nearest_error(column, scale, zero, bits, weights):
    """The least weighted squared error of one row with any code for any weight, by trying them all in float64."""
    grid = scale * (torch.arange(1 << bits, dtype=torch.float64) - zero)
    return (weights * (column[:, None] - grid).square().amin(1)).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_the_best_of_its_candidates(bits, symmetric):
    columns, weights = _columns()
    scales, zeros = fit_grid(columns, weights, Grid(bits=bits, symmetric=symmetric, search=RangeSearch()))
    top = (1 << bits) - 1
    for row in range(columns.shape[1]):
        column = columns[:, row].double()
        low, high = column.min().clamp(max=0), column.max().clamp(min=0)
        full = 2 * torch.maximum(-low, high) / top if symmetric else (high - low) / top
        zero = 1 << (bits - 1) if symmetric else round((-low / full).item())
        if zero == 0:
            zero, full = 1, high / (top - 1)
        tried = [(full * (1 - 0.6 * step / 24)).half().double() for step in range(24)]
        errors = torch.stack([_nearest_error(column, scale, zero, bits, weights.double()) for scale in tried])
        assert zeros[row] == zero
        found = _nearest_error(column, scales[row].double(), zero, bits, weights.double())
        assert found <= errors.min() * (1 + 1e-4)
        assert scales[row].double() in torch.stack(tried)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_searching_never_costs_more_than_the_full_range(bits, symmetric):
    columns, weights = _columns(rows=200)
    errors = []
    for search in (None, RangeSearch()):
        scales, zeros = fit_grid(columns, weights, Grid(bits=bits, symmetric=symmetric, search=search))
        errors.append(
            torch.stack(
                [
                    _nearest_error(columns[:, row].double(), scales[row].double(), zeros[row].double(), bits, weights.double())
                    for row in range(200)
                ]
            )
        )
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.95 * errors[0].sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_are_whole_and_none_is_zero(bits):
    columns, weights = _columns(rows=64)
    columns[:, :8] = columns[:, :8].abs()
    columns[:, 8:16] = -columns[:, 8:16].abs()
    scales, zeros = fit_grid(columns, weights, Grid(bits=bits, symmetric=False, search=RangeSearch()))
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() == 1
    assert zeros.max() == (1 << bits) - 1
    assert torch.equal(
        fit_grid(columns, weights, Grid(bits=bits, symmetric=True, search=RangeSearch()))[1],
        torch.full((64,), 2.0 ** (bits - 1)),
    )
    assert torch.equal(scales, scales.half().float())


def test_minimum_and_maximum_are_within_half_a_step_of_an_ordinary_group():
    columns, weights = _columns(rows=300)
    scales, zeros = fit_grid(columns, weights, Grid(bits=4, symmetric=False))
    codes = torch.round(columns / scales + zeros).clamp(0, 15)
    straddling = (columns.amin(0) < -scales) & (columns.amax(0) > scales)
    assert straddling.sum() > 250
    # The zero is rounded, which moves the ends of the grid by half a step at the most.
    errors = ((codes - zeros) * scales - columns).abs() / scales
    assert errors[:, straddling].max() <= 1.01


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_and_of_one_value_are_finite(symmetric):
    columns = torch.zeros(8, 4)
    columns[:, 1], columns[:, 2], columns[:, 3] = 0.5, -0.5, 1e-9
    scales, zeros = fit_grid(columns, torch.ones(8), Grid(bits=4, symmetric=symmetric, search=RangeSearch()))
    values = scales * (torch.round(columns / scales + zeros).clamp(0, 15) - zeros)
    assert scales[0] == scales[3] == SMALLEST_SCALE
    assert torch.equal(values[:, [0, 3]], torch.zeros(8, 2))
    # Between two codes at the worst where the grid is symmetric, and on a code where it is not.
    worst = 0.51 * scales if symmetric else 2**-11 * columns[0].abs()
    assert ((values - columns).abs()[:, 1:3] <= worst[1:3]).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_group_of_one_sign_is_within_half_a_step(bits):
    columns, weights = _columns(rows=100)
    for group in (columns.abs(), -columns.abs(), columns.abs() + 0.3):
        scales, zeros = fit_grid(group, weights, Grid(bits=bits, symmetric=False))
        codes = torch.round(group / scales + zeros).clamp(0, (1 << bits) - 1)
        assert (((codes - zeros) * scales - group).abs() <= 0.51 * scales).all()


def test_stored_scales_are_numbers_of_float16_and_never_nothing():
    scales = stored_scales(torch.tensor([0.0, 1e-9, 6.2e-5, 0.1234567]))
    assert torch.equal(scales, scales.half().float())
    assert scales[0] == scales[1] == SMALLEST_SCALE > 0
    torch.testing.assert_close(scales[2:], torch.tensor([6.2e-5, 0.1234567]), rtol=2**-11, atol=0)


def _swept(*, act_order, static, group_size, refined=True, symmetric=False):
    matrix, hessian = problem(10, 96, seed=1)
    order = torch.argsort(hessian.diagonal(), descending=True) if act_order else None
    factor = inverse_factor(hessian, 0.01, order)
    columns = (matrix if order is None else matrix[:, order]).T.contiguous()
    quantizer = UniformColumns(
        96, group_size=group_size, grid=Grid(bits=3, symmetric=symmetric, search=RangeSearch()), order=order
    )
    if static:
        quantizer.fix_groups(columns, factor.pivots)
    result = sweep(columns, factor, quantizer)
    if refined:
        refine(columns, result, factor.hessian, quantizer)
    back = torch.empty_like(result)
    back[torch.arange(96) if order is None else order] = result
    return matrix, order, factor, quantizer.result(), back.T


@pytest.mark.parametrize("group_size", [16, 32, 96])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_kept_is_what_the_sweep_returned(act_order, static, group_size, symmetric):
    _, order, _, codes, expected = _swept(act_order=act_order, static=static, group_size=group_size, symmetric=symmetric)
    torch.testing.assert_close(codes.dequantize(), expected, atol=1e-6, rtol=1e-6)
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.max() <= 7
    assert codes.scales.shape == codes.zeros.shape == (10, 96 // group_size)
    assert codes.group_size == group_size
    if act_order and not static and group_size < 96:
        places = torch.argsort(order)
        assert torch.equal(codes.groups.long(), places // group_size)
        assert codes.groups.dtype == torch.int32
    else:
        assert codes.groups is None


def test_static_groups_are_fitted_to_runs_of_model_columns():
    matrix, order, factor, codes, _ = _swept(act_order=True, static=True, group_size=32, refined=False)
    pivots = factor.pivots[torch.argsort(order)]
    for group in range(3):
        inside = slice(32 * group, 32 * group + 32)
        scales, zeros = fit_grid(
            matrix[:, inside].T, pivots[inside].square().reciprocal(), Grid(bits=3, symmetric=False, search=RangeSearch())
        )
        assert torch.equal(codes.scales[:, group], scales)
        assert torch.equal(codes.zeros[:, group], zeros)


def test_rows_are_a_part_of_the_matrix():
    codes = _swept(act_order=True, static=False, group_size=16)[3]
    part = codes.rows(3, 7)
    assert torch.equal(part.dequantize(), codes.dequantize()[3:7])
    assert torch.equal(part.groups, codes.groups)


def test_dequantizing_follows_the_formula():
    codes = UniformCodes(
        codes=torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, 2.0], [1.0, 4.0]]),
        zeros=torch.tensor([[1.0, 2.0], [0.0, 3.0]]),
        bits=2,
    )
    assert codes.dequantize().tolist() == [[-0.5, 0.0, 0.0, 2.0], [3.0, 2.0, -8.0, -12.0]]
    scattered = UniformCodes(
        codes=codes.codes, scales=codes.scales, zeros=codes.zeros, bits=2, groups=torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    )
    assert scattered.dequantize().tolist() == [[-4.0, 0.0, 0.0, 1.0], [0.0, 2.0, -8.0, 0.0]]
