"""The fit of a matrix whose rows lie on several processes, beside that of one process."""

import pytest
import torch

from algorithms.numerics.codebooks.additive import AdditiveCodes, quadratic_error
from algorithms.numerics.codebooks.additive_fit import AdditiveSettings, fit_additive
from algorithms.numerics.codebooks.codebook_fit import solve_codebooks
from algorithms.numerics.codebooks.kmeans import residual_kmeans
from algorithms.numerics.spread import Spread
from tests.support.matrices import problem, random_codes
from tests.support.rank_processes import run_on_ranks


def _spread(ranks):
    return Spread(index=ranks.rank, count=ranks.size, sum_=ranks.sum_)


def _generator():
    return torch.Generator().manual_seed(0)


def _fit(ranks, matrix, hessian, settings):
    spread, og = _spread(ranks), settings.group_shape[0]
    groups = spread.run_of(matrix.shape[0] // og)
    return fit_additive(matrix[groups.start * og : groups.stop * og], hessian, settings, _generator(), spread)


@pytest.mark.parametrize(
    ("size", "shape", "changes"),
    [
        (2, (96, 128), {}),
        (3, (98, 128), {"group_shape": (2, 4), "beam_size": 2}),  # 49 output groups do not divide by three
        (2, (2304, 64), {"max_points": 2048}),  # codebooks from a sample of the output groups, k-means from one of the points
        (2, (192, 64), {"num_codebooks": 1, "num_codewords": 2048, "max_rounds": 2}),  # k-means in two levels
    ],
)
def test_the_fit_of_a_spread_matrix_is_as_good(size, shape, changes):
    matrix, hessian = problem(*shape)
    options = {"num_codebooks": 2, "num_codewords": 16, "group_shape": (1, 4), "relative_tolerance": None, "max_rounds": 8}
    settings = AdditiveSettings(**options | changes)
    alone = fit_additive(matrix, hessian, settings, _generator())
    fits = run_on_ranks(_fit, size, matrix, hessian, settings)
    weight = AdditiveCodes.joined([fit.weight for fit in fits])
    assert weight.codes.shape == alone.weight.codes.shape
    assert fits[0].losses[-1] == pytest.approx(quadratic_error(matrix - weight.dequantize(), hessian), rel=1e-4)
    assert fits[0].losses[-1] == pytest.approx(alone.losses[-1], rel=5e-3)
    for fit in fits[1:]:
        assert fit.losses == fits[0].losses
        assert torch.equal(fit.weight.codebooks, fits[0].weight.codebooks)


def _solve(ranks, weight, error, hessian, counts):
    codes, scales, rows = (tensor.split(counts)[ranks.rank] for tensor in (weight.codes, weight.scales, error))
    part = weight.replace(codes=codes, scales=scales)
    return solve_codebooks(part, rows, hessian, iterations=3, spread=_spread(ranks))


def test_codebooks_are_those_of_all_rows_even_where_a_process_has_none():
    matrix, hessian = problem(40, 32)
    weight = random_codes(40, 32, num_codebooks=2, num_codewords=8)
    error = (matrix - weight.dequantize()) @ hessian
    codebooks, moved = solve_codebooks(weight, error, hessian, iterations=3)
    found = run_on_ranks(_solve, 3, weight, error, hessian, [25, 0, 15])
    for mine, _ in found:
        torch.testing.assert_close(mine, codebooks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([rows for _, rows in found]), moved, atol=1e-3, rtol=1e-4)


def _cluster(ranks, points, num_codewords):
    part = points.split([300, 0, 500])[ranks.rank]
    options = {"max_iterations": 20, "max_points": None, "generator": _generator()}
    return residual_kmeans(part, 2, num_codewords, **options, spread=_spread(ranks))


def test_k_means_of_spread_points_finds_the_same_centres():
    points = torch.randn(800, 4, generator=_generator())
    alone = residual_kmeans(points, 2, 16, max_iterations=20, max_points=None, generator=_generator())
    found = run_on_ranks(_cluster, 3, points, 16)
    for codebooks, _ in found:
        torch.testing.assert_close(codebooks, alone[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.cat([codes for _, codes in found]), alone[1])
