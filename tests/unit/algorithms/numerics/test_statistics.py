import numpy
import pytest
import torch

from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.statistics import InputStatistics
from tests.support.rank_processes import run_on_ranks


def test_hessian_is_the_mean_outer_product():
    inputs = torch.randn(7, 11, 5)
    statistics = InputStatistics(5)
    for batch in inputs:
        statistics.update(batch)
    rows = inputs.reshape(-1, 5).double()
    torch.testing.assert_close(statistics.hessian().double(), rows.T @ rows / 77, rtol=1e-6, atol=1e-6)


def _gather(ranks, inputs, wanted, first):
    """The first rank has wanted outputs for all of its tokens, the second for none of them, a third has no tokens."""
    statistics = InputStatistics(inputs.shape[1], out_features=wanted.shape[1])
    if ranks.rank == 0:
        statistics.update(inputs[:first], wanted[:first])
    elif ranks.rank == 1:
        statistics.update(inputs[first:])
    statistics.add_up(ranks.sum_)
    return statistics


def test_what_several_processes_gather_adds_up_to_the_whole():
    inputs, wanted, matrix = torch.randn(40, 4), torch.randn(40, 3), torch.randn(3, 4)
    inputs[[3, 30]] = torch.inf
    whole = InputStatistics(4, out_features=3)
    whole.update(inputs[:13], wanted[:13])
    whole.update(inputs[13:])
    for statistics in run_on_ranks(_gather, 3, inputs, wanted, 13):
        torch.testing.assert_close(statistics.hessian(), whole.hessian())
        torch.testing.assert_close(statistics.corrected(matrix), whole.corrected(matrix))
        assert (statistics.num_tokens, statistics.num_corrected, statistics.num_skipped) == (38, 12, 2)


def test_rows_are_corrected_as_in_the_whole_matrix():
    inputs, matrix = torch.randn(50, 4), torch.randn(6, 4)
    statistics = InputStatistics(4, out_features=6)
    statistics.update(inputs, inputs @ matrix.T + torch.randn(50, 6))
    torch.testing.assert_close(statistics.corrected(matrix[2:5], slice(2, 5)), statistics.corrected(matrix)[2:5])


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    inputs = torch.randn(10, 4)
    clean = InputStatistics(4)
    clean.update(inputs)
    dirty = InputStatistics(4)
    dirty.update(torch.cat([inputs, torch.tensor([[1.0, torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0, 0.0]])]))
    torch.testing.assert_close(dirty.hessian(), clean.hessian())
    assert (dirty.num_tokens, dirty.num_skipped) == (10, 2)


def test_where_nothing_is_finite_all_errors_count_the_same_and_no_correction_is_made():
    statistics, matrix = InputStatistics(2, out_features=3), torch.randn(3, 2)
    with pytest.raises(ValueError, match="no token reached"):
        statistics.hessian()
    statistics.update(torch.full((3, 2), torch.nan), torch.randn(3, 3))
    assert torch.equal(statistics.hessian(), torch.eye(2))
    assert torch.equal(statistics.corrected(matrix), matrix)


@pytest.mark.parametrize("size", [1e16, 1e20, 3e38])
def test_tokens_whose_squares_do_not_add_up_are_left_out(size):
    inputs = torch.randn(10, 4)
    clean, loud = InputStatistics(4), InputStatistics(4)
    clean.update(inputs)
    loud.update(torch.cat([inputs, size * torch.ones(2, 4)]))
    torch.testing.assert_close(loud.hessian(), clean.hessian())
    assert loud.num_skipped == 2


def test_a_correction_that_float16_does_not_hold_is_not_made():
    inputs, matrix = torch.randn(50, 4), torch.randn(3, 4)
    for factor, is_made in ((1.0, True), (1e9, False)):
        statistics = InputStatistics(4, out_features=3)
        statistics.update(inputs, factor * torch.randn(50, 3))
        assert torch.equal(statistics.corrected(matrix), matrix) != is_made
        assert torch.equal(statistics.refitted(matrix, 0.1)[0], matrix) != is_made


def test_generators_differ_by_place_and_repeat():
    draws = {place: torch.rand(1, generator=keyed_generator(0, *place)).item() for place in [(1, "a"), (1, "b"), (2, "a")]}
    assert len(set(draws.values())) == 3
    assert torch.rand(1, generator=keyed_generator(0, 1, "a")).item() == draws[(1, "a")]
    assert torch.rand(1, generator=keyed_generator(1, 1, "a")).item() != draws[(1, "a")]


def test_the_corrected_weight_solves_the_regression_onto_the_wanted_outputs():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(400, 6, generator=generator)
    inputs = originals @ (torch.eye(6) + 0.2 * torch.randn(6, 6, generator=generator))
    inputs += 0.1 * torch.randn(400, 6, generator=generator)
    matrix = torch.randn(3, 6, generator=generator)
    wanted = originals @ matrix.T + 0.3 * torch.randn(400, 3, generator=generator)
    statistics = InputStatistics(6, out_features=3)
    for part in (slice(0, 150), slice(150, 400)):
        statistics.update(inputs[part], wanted[part])
    # The ridge (6 features / 400 tokens) as extra rows of an ordinary least-squares problem whose answer is matrix where
    # there is no evidence.
    weight = (6 / 400 * (inputs.double().T @ inputs.double()).diagonal().mean()).sqrt() * torch.eye(6, dtype=torch.float64)
    design = torch.cat([inputs.double(), weight])
    answers = torch.cat([wanted.double(), weight @ matrix.double().T])
    expected = torch.linalg.lstsq(design, answers).solution.T
    torch.testing.assert_close(statistics.corrected(matrix).double(), expected, atol=1e-5, rtol=1e-5)


def test_outputs_that_the_weight_gives_need_no_correction():
    inputs, matrix = torch.randn(50, 4), torch.randn(2, 4)
    statistics = InputStatistics(4, out_features=2)
    statistics.update(inputs, inputs @ matrix.T)
    torch.testing.assert_close(statistics.corrected(matrix), matrix)
    plain = InputStatistics(4)
    plain.update(inputs)
    assert plain.corrected(matrix) is matrix
    with pytest.raises(ValueError, match="wanted"):
        plain.update(inputs, inputs @ matrix.T)


def test_tokens_without_a_wanted_output_count_for_the_hessian_alone():
    inputs, others, matrix = torch.randn(50, 4), torch.randn(70, 4), torch.randn(2, 4)
    some, part = InputStatistics(4, out_features=2), InputStatistics(4, out_features=2)
    some.update(inputs, inputs @ matrix.T + 1)
    part.update(inputs, inputs @ matrix.T + 1)
    some.update(others)
    torch.testing.assert_close(some.corrected(matrix), part.corrected(matrix))
    both = torch.cat([inputs, others])
    torch.testing.assert_close(some.hessian(), both.T @ both / 120)
    hessian = some.hessian()
    some.add_up(lambda tensor: tensor.mul_(2))  # as if another process had gathered the same
    torch.testing.assert_close(some.hessian(), hessian)
    assert (some.num_tokens, some.num_corrected) == (240, 100)


def test_the_panels_of_the_product_cover_it():
    inputs = torch.randn(30, 300)
    statistics = InputStatistics(300)
    statistics.update(inputs)
    torch.testing.assert_close(statistics.hessian(), inputs.T @ inputs / 30, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("ridge", [0.02, 0.7])
def test_the_refitted_weight_and_bias_solve_the_damped_regression(affine, ridge):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 2
    matrix = torch.randn(3, 6, generator=generator)
    wanted = inputs @ matrix.T + 0.5 * torch.randn(400, 3, generator=generator) - 7
    statistics = InputStatistics(6, out_features=3)
    for part in (slice(0, 150), slice(150, 400)):
        statistics.update(inputs[part], wanted[part])
    weight, bias = statistics.refitted(matrix, ridge, affine=affine)
    x, y = inputs.double().numpy(), wanted.double().numpy()
    # The ridge pulls towards the old weight by rows of its own, which the intercept does not reach.
    spread = (x - x.mean(0) if affine else x) ** 2
    pull = (400 * ridge * spread.mean()) ** 0.5 * numpy.eye(6)
    ones, zeros = numpy.ones((400, 1)), numpy.zeros((6, 1))
    design = numpy.block([[x, ones], [pull, zeros]]) if affine else numpy.concatenate([x, pull])
    expected = numpy.linalg.lstsq(design, numpy.concatenate([y, pull @ matrix.double().numpy().T]), rcond=None)[0]
    numpy.testing.assert_allclose(weight.numpy(), expected[:6].T, rtol=1e-4, atol=1e-4)
    numpy.testing.assert_allclose(bias.numpy(), expected[6] if affine else numpy.zeros(3), rtol=1e-4, atol=1e-4)


def test_few_tokens_pull_a_refit_towards_the_old_weight():
    inputs, matrix = torch.randn(3, 30), torch.randn(2, 30)
    statistics = InputStatistics(30, out_features=2)
    statistics.update(inputs, torch.randn(3, 2))
    few, _ = statistics.refitted(matrix, 1e-6)
    forced, _ = statistics.refitted(matrix, 10.0)  # 30 inputs over 3 tokens
    torch.testing.assert_close(few, forced)


def test_a_refit_takes_wanted_outputs():
    statistics = InputStatistics(4, out_features=2)
    statistics.update(torch.randn(5, 4))
    with pytest.raises(ValueError, match="wanted outputs"):
        statistics.refitted(torch.randn(2, 4), 0.1)
