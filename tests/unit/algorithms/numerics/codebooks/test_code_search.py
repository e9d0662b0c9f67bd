import itertools

import pytest
import torch

from algorithms.numerics.codebooks.additive import quadratic_error
from algorithms.numerics.codebooks.code_search import beam_search, coordinate_descent
from tests.support.matrices import problem, random_codes


def _search(weight, matrix, hessian, beam_size, seed=0):
    error = (matrix - weight.dequantize()) @ hessian
    generator = torch.Generator().manual_seed(seed)
    if beam_size == 1:
        codes, error = coordinate_descent(weight, error, hessian, generator=generator)
    else:
        codes, error = beam_search(weight, error, matrix, hessian, beam_size=beam_size, generator=generator)
    return weight.replace(codes=codes), error


@pytest.mark.parametrize("beam_size", [1, 3])
def test_identity_hessian_and_one_codebook_is_the_nearest_codeword(beam_size):
    matrix, _ = problem(8, 16)
    weight = random_codes(8, 16, num_codebooks=1, num_codewords=9)
    found, _ = _search(weight, matrix, torch.eye(16), beam_size)
    tiles = matrix.view(8, 4, 1, 4)
    distances = (tiles - weight.scales.view(8, 1, 1, 1) * weight.codebooks[0, :, 0]).square().sum(-1)
    assert torch.equal(found.codes[..., 0], distances.argmin(-1))


@pytest.mark.parametrize("beam_size", [1, 2, 8])
@pytest.mark.parametrize("group_shape", [(1, 4), (2, 4)])
def test_the_loss_never_rises_and_the_error_is_kept_exactly(beam_size, group_shape):
    matrix, hessian = problem(16, 160)
    weight = random_codes(16, 160, num_codebooks=2, num_codewords=16, group_shape=group_shape)
    loss = quadratic_error(matrix - weight.dequantize(), hessian)
    for sweep in range(4):
        weight, error = _search(weight, matrix, hessian, beam_size, seed=sweep)
        after = quadratic_error(matrix - weight.dequantize(), hessian)
        assert after <= loss * (1 + 1e-6)
        loss = after
        recomputed = (matrix - weight.dequantize()) @ hessian
        assert (error - recomputed).abs().max() < 1e-5 * ((matrix @ hessian).abs().max() + 1)


def test_a_wide_beam_finds_the_optimum_of_a_small_problem():
    matrix, hessian = problem(6, 8)
    weight = random_codes(6, 8, num_codebooks=2, num_codewords=4)
    found, _ = _search(weight, matrix, hessian, beam_size=256)
    choices = torch.tensor(list(itertools.product(range(4), repeat=4))).view(-1, 2, 2)
    for row in range(6):
        losses = []
        for codes in choices:
            guess = weight.replace(codes=codes[None], scales=weight.scales[row : row + 1]).dequantize()
            losses.append(quadratic_error(matrix[row : row + 1] - guess, hessian))
        ours = found.replace(codes=found.codes[row : row + 1], scales=weight.scales[row : row + 1]).dequantize()
        assert quadratic_error(matrix[row : row + 1] - ours, hessian) == pytest.approx(min(losses), rel=1e-5)


def test_wider_beams_do_not_lose():
    matrix, hessian = problem(32, 32)
    weight = random_codes(32, 32, num_codebooks=2, num_codewords=8)
    losses = [
        quadratic_error(matrix - _search(weight, matrix, hessian, beam_size)[0].dequantize(), hessian)
        for beam_size in (1, 4, 16)
    ]
    assert losses[2] < losses[1] < losses[0]


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    matrix, hessian = problem(12, 16)
    weight = random_codes(12, 16, num_codebooks=2, num_codewords=8)
    whole = [_search(weight, matrix, hessian, beam_size)[0].codes for beam_size in (1, 4)]
    monkeypatch.setattr("algorithms.numerics.codebooks.code_search._MAX_SCORES", 8 * 16 * 5)
    monkeypatch.setattr("algorithms.numerics.codebooks.nearest._MAX_SCORES", 8 * 5)
    parts = [_search(weight, matrix, hessian, beam_size)[0].codes for beam_size in (1, 4)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
