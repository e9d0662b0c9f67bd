import pytest
import torch

from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.statistics import InputStatistics


def test_hessian_is_the_mean_outer_product():
    inputs = torch.randn(7, 11, 5)
    statistics = InputStatistics(5)
    for batch in inputs:
        statistics.update(batch)
    rows = inputs.reshape(-1, 5).double()
    torch.testing.assert_close(statistics.hessian().double(), rows.T @ rows / 77, rtol=1e-6, atol=1e-6)


def test_two_halves_merge_to_the_whole():
    inputs = torch.randn(40, 4)
    whole, left, right = (InputStatistics(4) for _ in range(3))
    whole.update(inputs)
    left.update(inputs[:13])
    right.update(inputs[13:])
    left.merge(right)
    torch.testing.assert_close(left.hessian(), whole.hessian())
    assert left.num_tokens == 40


def test_tokens_that_are_not_finite_are_left_out_and_counted():
    inputs = torch.randn(10, 4)
    clean = InputStatistics(4)
    clean.update(inputs)
    dirty = InputStatistics(4)
    dirty.update(torch.cat([inputs, torch.tensor([[1.0, torch.inf, 0.0, 0.0], [torch.nan, 0.0, 0.0, 0.0]])]))
    torch.testing.assert_close(dirty.hessian(), clean.hessian())
    assert (dirty.num_tokens, dirty.num_skipped) == (10, 2)


def test_nothing_finite_is_an_error():
    statistics = InputStatistics(2)
    statistics.update(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="no finite activations"):
        statistics.hessian()


def test_generators_differ_by_place_and_repeat():
    draws = {place: torch.rand(1, generator=keyed_generator(0, *place)).item() for place in [(1, "a"), (1, "b"), (2, "a")]}
    assert len(set(draws.values())) == 3
    assert torch.rand(1, generator=keyed_generator(0, 1, "a")).item() == draws[(1, "a")]
    assert torch.rand(1, generator=keyed_generator(1, 1, "a")).item() != draws[(1, "a")]


def test_the_corrected_weight_solves_the_regression_onto_the_original_outputs():
    generator = torch.Generator().manual_seed(0)
    originals = torch.randn(400, 6, generator=generator)
    inputs = originals @ (torch.eye(6) + 0.2 * torch.randn(6, 6, generator=generator))
    inputs += 0.1 * torch.randn(400, 6, generator=generator)
    matrix = torch.randn(3, 6, generator=generator)
    statistics = InputStatistics(6, paired=True)
    for part in (slice(0, 150), slice(150, 400)):
        statistics.update(inputs[part], originals[part])
    # The ridge as extra rows of an ordinary least-squares problem whose answer is matrix where there is no evidence.
    weight = (0.01 * (inputs.double().T @ inputs.double()).diagonal().mean()).sqrt() * torch.eye(6, dtype=torch.float64)
    design = torch.cat([inputs.double(), weight])
    wanted = torch.cat([originals.double() @ matrix.double().T, weight @ matrix.double().T])
    expected = torch.linalg.lstsq(design, wanted).solution.T
    torch.testing.assert_close(statistics.corrected(matrix).double(), expected, atol=1e-5, rtol=1e-5)


def test_equal_inputs_need_no_correction():
    inputs, matrix = torch.randn(50, 4), torch.randn(2, 4)
    statistics = InputStatistics(4, paired=True)
    statistics.update(inputs, inputs)
    assert torch.equal(statistics.corrected(matrix), matrix)
    with pytest.raises(ValueError, match="paired"):
        statistics.update(inputs)
