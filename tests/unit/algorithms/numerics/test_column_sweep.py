import math
from itertools import pairwise

import pytest
import torch

from algorithms.numerics.column_sweep import column_costs, inverse_factor, quadratic_loss, refine, sweep
from algorithms.numerics.uniform import Grid, RangeSearch, UniformColumns, fit_grid
from tests.support.matrices import problem

WHOLE_ROW = -1


class _Grid:
    """A column quantizer of one fixed grid, which notes what it was asked."""

    def __init__(self, group_size=16, step=0.25):
        self.group_size, self._step = group_size, step
        self.begun = []

    def begin_group(self, start, columns, pivots):
        self.begun.append((start, columns.clone(), pivots.clone()))

    def quantize(self, place, column, pivot):
        return self.requantize(place, column)

    def requantize(self, place, column):
        return torch.round(column / self._step).clamp(-6, 6) * self._step


def _uniform(columns, group_size, **changes):
    grid = Grid(**({"bits": 3, "symmetric": False, "search": RangeSearch()} | changes))
    size = columns.shape[0] if group_size == WHOLE_ROW else group_size
    return UniformColumns(columns.shape[0], group_size=size, grid=grid)


def _damped(hessian, damping):
    wide = hessian.double()
    return wide + damping * wide.diagonal().mean() * torch.eye(wide.shape[0], dtype=torch.float64)


def _textbook(columns, hessian, quantizer):
    """Column by column in float64 with the inverse of what is left, each column struck out by Gaussian elimination."""
    work, result = columns.double().clone(), torch.zeros_like(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    for place in range(columns.shape[0]):
        pivot = inverse[place, place].clone()
        if place % quantizer.group_size == 0:
            later = [_pivot(inverse, place, step) for step in range(quantizer.group_size)]
            stop = place + quantizer.group_size
            quantizer.begin_group(place, work[place:stop].float(), torch.stack(later).sqrt().float())
        result[place] = quantizer.quantize(place, work[place].float(), pivot.sqrt().float())
        error = (work[place] - result[place]) / pivot
        work -= torch.outer(inverse[:, place], error)
        inverse = inverse - torch.outer(inverse[:, place], inverse[place]) / pivot
    return result


def _pivot(inverse, place, ahead):
    """The diagonal element of a column once all between it and ``place`` are struck out."""
    for struck in range(place, place + ahead):
        inverse = inverse - torch.outer(inverse[:, struck], inverse[struck]) / inverse[struck, struck]
    return inverse[place + ahead, place + ahead]


def _naive(columns, factor, quantizer):
    """The same with the factor, every later column updated at once, in float64."""
    work, upper, result = columns.double().clone(), factor.upper.double(), torch.zeros_like(columns, dtype=torch.float64)
    for place in range(columns.shape[0]):
        if place % quantizer.group_size == 0:
            stop = place + quantizer.group_size
            quantizer.begin_group(place, work[place:stop].float(), factor.pivots[place:stop])
        result[place] = quantizer.quantize(place, work[place].float(), factor.pivots[place])
        error = (work[place] - result[place]) / upper[place, place]
        work[place + 1 :] -= torch.outer(upper[place, place + 1 :], error)
    return result


def _close(found, expected):
    """Equal, but for one output in which a value on the edge between two codes may have gone the other way."""
    off = (found.double() - expected).abs() > 1e-5
    assert off.any(0).sum() <= 1


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("ordered", [False, True])
def test_the_factor_is_that_of_the_inverse(damping, ordered):
    _, hessian = problem(2, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1)) if ordered else None
    factor = inverse_factor(hessian, damping, order)
    expected = _damped(hessian, damping)
    expected = expected if order is None else expected[order][:, order]
    upper = factor.upper.double()
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.pivots > 0).all()
    torch.testing.assert_close(upper.T @ upper @ expected, torch.eye(48, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(factor.hessian.double(), expected, atol=1e-6, rtol=1e-6)
    assert factor.damping == damping


def test_a_singular_hessian_is_damped_until_it_has_a_factor():
    inputs = torch.tensor([[1.0, 2.0, 3.0, -1.0]], dtype=torch.float64).repeat(3, 1)
    hessian = (inputs.T @ inputs).float() - 0.1 * torch.eye(4)
    factor = inverse_factor(hessian, 0.0)
    mean = hessian.double().diagonal().mean()
    lowest = torch.linalg.eigvalsh(hessian.double())[0]
    assert math.log10(factor.damping / 1e-4) == pytest.approx(round(math.log10(factor.damping / 1e-4)))
    assert lowest + factor.damping * mean > 0 > lowest + factor.damping / 10 * mean
    upper = factor.upper.double()
    product = upper.T @ upper @ _damped(hessian, factor.damping)
    torch.testing.assert_close(product, torch.eye(4, dtype=torch.float64), atol=1e-3, rtol=0)


def test_more_damping_than_was_asked_for_is_reported(caplog):
    indefinite = torch.eye(4) - 0.6 * torch.ones(4, 4)
    with caplog.at_level("WARNING"):
        inverse_factor(torch.eye(4), 0.01)
        assert caplog.text == ""
        inverse_factor(indefinite, 0.01)
    assert "damping" in caplog.text


def test_damping_grows_from_what_was_asked():
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    assert inverse_factor(hessian, 0.01).damping == pytest.approx(0.1)
    assert inverse_factor(hessian, 0.06).damping == 0.06


def test_without_any_factor_the_diagonal_counts():
    hessian = torch.tensor([[1.0, 1e6], [1e6, 3.0]])
    factor = inverse_factor(hessian, 0.0)
    assert factor.damping == math.inf
    expected = torch.tensor([1.0 + 2.0, 3.0 + 2.0])
    torch.testing.assert_close(factor.upper, expected.rsqrt().diag())
    torch.testing.assert_close(factor.hessian, expected.diag())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_dead_column_is_rounded_to_nearest_and_touches_no_other(damping):
    matrix, hessian = problem(12, 32, seed=2)
    dead, alive = torch.tensor([0, 13]), torch.tensor([i for i in range(32) if i not in (0, 13)])
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    hessian = hessian + 1e-3 * torch.diag((hessian.diagonal() > 0).float())
    columns = matrix.T.contiguous()
    factor = inverse_factor(hessian, damping)
    assert factor.damping == damping
    result = sweep(columns, factor, _Grid(group_size=1))
    assert torch.equal(result[dead], _Grid().requantize(0, columns[dead]))
    # The others stand as if the dead ones were not there; the damping's mean is over all columns, dead ones included.
    others = inverse_factor(hessian[alive][:, alive], damping * len(alive) / 32)
    _close(result[alive], sweep(columns[alive], others, _Grid(group_size=1)).double())


@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_a_sweep_is_the_textbooks(group_size):
    matrix, hessian = problem(8, 16, seed=3)
    columns = matrix.T.contiguous()
    expected = _textbook(columns, _damped(hessian, 0.01), _uniform(columns, group_size))
    result = sweep(columns, inverse_factor(hessian, 0.01), _uniform(columns, group_size))
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("width", "group_size"),
    [(256, 16), (256, 64), (288, 96), (384, 128), (768, 384), (320, WHOLE_ROW), (320, 160), (200, 8), (260, 260), (129, 1)],
)
def test_lazy_updates_change_nothing(width, group_size):
    matrix, hessian = problem(6, width, seed=4)
    columns = matrix.T.contiguous()
    before = columns.clone()
    factor = inverse_factor(hessian, 0.01)
    result = sweep(columns, factor, _uniform(columns, group_size))
    _close(result, _naive(columns, factor, _uniform(columns, group_size)))
    assert torch.equal(columns, before)


@pytest.mark.parametrize(("width", "group_size"), [(288, 96), (768, 384), (320, 160), (256, 16)])
def test_every_group_begins_whole_and_up_to_date(width, group_size):
    matrix, hessian = problem(5, width, seed=5)
    columns, factor = matrix.T.contiguous(), inverse_factor(hessian, 0.01)
    lazy, naive = _Grid(group_size), _Grid(group_size)
    sweep(columns, factor, lazy)
    _naive(columns, factor, naive)
    assert [start for start, _, _ in lazy.begun] == list(range(0, width, group_size))
    for (_, found, pivots), (start, expected, _) in zip(lazy.begun, naive.begun, strict=True):
        assert found.shape == (group_size, 5)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
        assert torch.equal(pivots, factor.pivots[start : start + group_size])


def test_without_a_factor_every_column_is_rounded_to_nearest():
    matrix, _ = problem(7, 64)
    columns = matrix.T.contiguous()
    result = sweep(columns, None, _uniform(columns, 16, search=None))
    for start in range(0, 64, 16):
        group = columns[start : start + 16]
        scales, zeros = fit_grid(group, torch.ones(16), Grid(bits=3, symmetric=False))
        grid = scales[:, None] * (torch.arange(8) - zeros[:, None])  # [O, 8]
        nearest = (group[:, :, None] - grid).abs().amin(-1)
        torch.testing.assert_close((group - result[start : start + 16]).abs(), nearest, atol=1e-6, rtol=0)


def test_what_order_the_columns_come_in_is_no_matter_to_the_order_of_the_sweep():
    matrix, hessian = problem(6, 160, seed=6)
    shuffle = torch.randperm(160, generator=torch.Generator().manual_seed(2))
    results = []
    for arrangement in (torch.arange(160), shuffle):
        shown, seen = matrix[:, arrangement], hessian[arrangement][:, arrangement]
        order = torch.argsort(seen.diagonal(), descending=True)
        columns = shown[:, order].T.contiguous()
        swept = sweep(columns, inverse_factor(seen, 0.01, order), _uniform(columns, 32))
        back = torch.empty_like(swept)
        back[arrangement[order]] = swept
        results.append(back)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group_size", [16, WHOLE_ROW])
def test_a_sweep_beats_rounding_to_nearest_where_inputs_are_correlated(group_size):
    for seed in range(3):
        matrix, hessian = problem(24, 192, seed=seed)
        columns, factor = matrix.T.contiguous(), inverse_factor(hessian, 0.01)
        plain = quadratic_loss(columns, sweep(columns, None, _uniform(columns, group_size)), hessian)
        assert quadratic_loss(columns, sweep(columns, factor, _uniform(columns, group_size)), hessian) < 0.6 * plain


def test_the_loss_is_the_squared_error_of_the_outputs():
    matrix, _ = problem(5, 12)
    inputs = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = matrix + 0.1
    expected = (inputs @ (matrix - other).double().T).square().sum(1).mean()
    hessian = (inputs.T @ inputs / 40).float()
    assert quadratic_loss(matrix.T, other.T, hessian) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("width", [24, 128, 300])
def test_refining_is_coordinate_descent_and_never_raises_the_loss(width):
    matrix, hessian = problem(9, width, seed=7)
    columns, factor = matrix.T.contiguous(), inverse_factor(hessian, 0.01)
    quantizer = _Grid(group_size=1)
    result = sweep(columns, factor, quantizer)
    wide, expected = factor.hessian.double(), result.double().clone()
    losses = [quadratic_loss(columns, result, factor.hessian)]
    for _ in range(3):
        for place in range(width):
            pull = wide[place] @ (columns.double() - expected)
            expected[place] = quantizer.requantize(place, (expected[place] + pull / wide[place, place]).float())
        returned = refine(columns, result, factor.hessian, quantizer)
        assert returned is result
        _close(result, expected)
        losses.append(quadratic_loss(columns, result, factor.hessian))
    assert losses[1] < losses[0]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))


def test_costs_are_what_a_conditional_variance_is():
    _, hessian = problem(1, 24, seed=8)
    costs, wide = column_costs(hessian, 0.02), _damped(hessian, 0.02)
    for place in range(24):
        later, cross = wide[place + 1 :, place + 1 :], wide[place, place + 1 :]
        left = wide[place, place] - cross @ torch.linalg.solve(later, cross)
        assert costs[place].item() == pytest.approx(left.item(), rel=1e-3)
    torch.testing.assert_close(costs, inverse_factor(hessian, 0.02).pivots.square().reciprocal(), rtol=1e-3, atol=0)


def test_costs_of_a_matrix_that_cannot_be_factored_are_its_diagonal():
    hessian = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert column_costs(hessian, 0.0).tolist() == [1.0, 1.0]
    assert column_costs(torch.zeros(3, 3), 0.01).tolist() == [0.0, 0.0, 0.0]
