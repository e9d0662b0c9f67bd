import pytest
import torch

from algorithms.numerics.codebooks.additive import code_rows, quadratic_error, ungroup
from algorithms.numerics.codebooks.codebook_fit import solve_codebooks, solve_scales
from tests.support.matrices import problem, random_codes


def _least_squares_loss(weight, matrix, hessian):
    """The smallest loss over codebooks, by a dense float64 least-squares solve of every codeword entry at once."""
    factor = torch.linalg.cholesky(hessian.double() + 1e-12 * torch.eye(hessian.shape[0])).T
    M, K, og, ig = weight.codebooks.shape
    unknowns = M * K * og * ig
    design = torch.zeros(matrix.shape[0], matrix.shape[1], unknowns, dtype=torch.float64)
    rows = code_rows(weight.codes, K)
    for unknown in range(unknowns):
        flat = torch.zeros(M * K, og * ig, dtype=torch.float64)
        flat.view(-1)[unknown] = 1.0
        tiles = flat[rows].sum(1).view(*weight.codes.shape[:2], -1) * weight.scales[:, None, None].double()
        design[..., unknown] = ungroup(tiles, (og, ig))
    columns = torch.einsum("ij,ojk->oik", factor, design).reshape(-1, unknowns)
    wanted = (matrix.double() @ factor.T).reshape(-1, 1)
    solution = torch.linalg.lstsq(columns, wanted, driver="gelsd").solution
    return torch.sum((wanted - columns @ solution).square()).item()


@pytest.mark.parametrize("group_shape", [(1, 4), (2, 2)])
def test_conjugate_gradients_reach_the_least_squares_solution(group_shape):
    matrix, hessian = problem(24, 8)
    weight = random_codes(24, 8, num_codebooks=2, num_codewords=4, group_shape=group_shape)
    error = (matrix - weight.dequantize()) @ hessian
    codebooks, error = solve_codebooks(weight, error, hessian, iterations=300)
    solved = weight.replace(codebooks=codebooks)
    loss = quadratic_error(matrix - solved.dequantize(), hessian)
    assert loss == pytest.approx(_least_squares_loss(weight, matrix, hessian), rel=1e-4)
    torch.testing.assert_close(error, (matrix - solved.dequantize()) @ hessian, atol=1e-4, rtol=1e-4)


def test_every_iteration_lowers_the_loss():
    matrix, hessian = problem(64, 32)
    weight = random_codes(64, 32, num_codebooks=2, num_codewords=16)
    error = (matrix - weight.dequantize()) @ hessian
    losses = [quadratic_error(matrix - weight.dequantize(), hessian)]
    for iterations in (1, 2, 4, 8, 16):
        solved = weight.replace(codebooks=solve_codebooks(weight, error, hessian, iterations=iterations)[0])
        losses.append(quadratic_error(matrix - solved.dequantize(), hessian))
    assert losses == sorted(losses, reverse=True)


def test_codewords_that_nothing_uses_stay():
    matrix, hessian = problem(8, 8)
    weight = random_codes(8, 8, num_codebooks=1, num_codewords=64)
    error = (matrix - weight.dequantize()) @ hessian
    codebooks, _ = solve_codebooks(weight, error, hessian, iterations=20)
    unused = torch.ones(64, dtype=torch.bool)
    unused[weight.codes.flatten()] = False
    assert torch.equal(codebooks[0, unused], weight.codebooks[0, unused])
    assert torch.isfinite(codebooks).all()


def test_scales_equal_weighted_least_squares_per_row():
    matrix, hessian = problem(6, 8)
    weight = random_codes(6, 8, num_codebooks=1, num_codewords=8)
    # Targets near the codes, so that every best scale is positive.
    matrix = 1.7 * weight.dequantize() + 0.1 * matrix
    scales, error = solve_scales(weight, matrix, matrix @ hessian, (matrix - weight.dequantize()) @ hessian)
    unscaled = weight.replace(scales=torch.ones(6)).dequantize().double()
    for row in range(6):
        q, w, h = unscaled[row], matrix[row].double(), hessian.double()
        assert scales[row].item() == pytest.approx(((q @ h @ w) / (q @ h @ q)).item(), rel=1e-5)
    torch.testing.assert_close(error, (matrix - weight.replace(scales=scales).dequantize()) @ hessian, atol=1e-4, rtol=1e-4)


def test_a_zero_row_keeps_its_scale():
    matrix, hessian = problem(4, 8)
    weight = random_codes(4, 8, num_codebooks=1, num_codewords=4)
    weight = weight.replace(codebooks=torch.zeros_like(weight.codebooks))
    scales, _ = solve_scales(weight, matrix, matrix @ hessian, matrix @ hessian)
    assert torch.equal(scales, weight.scales)
