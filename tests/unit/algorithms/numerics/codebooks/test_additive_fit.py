import pytest
import torch

from algorithms.numerics.codebooks.additive import quadratic_error
from algorithms.numerics.codebooks.additive_fit import AdditiveSettings, fit_additive, initial_codes
from tests.support.matrices import problem


def _settings(**changes):
    return AdditiveSettings(**({"num_codebooks": 2, "num_codewords": 16, "group_shape": (1, 4)} | changes))


def _generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("group_shape", [(1, 4), (2, 4)])
def test_reported_losses_fall_and_the_last_is_true(group_shape):
    matrix, hessian = problem(64, 32)
    fit = fit_additive(matrix, hessian, _settings(group_shape=group_shape), _generator())
    assert list(fit.losses) == sorted(fit.losses, reverse=True)
    assert fit.losses[-1] == pytest.approx(quadratic_error(matrix - fit.weight.dequantize(), hessian), rel=1e-4)


def test_it_beats_k_means_with_the_codebooks_solved_exactly():
    matrix, hessian = problem(128, 64)
    fit = fit_additive(matrix, hessian, _settings(), _generator())
    only_continuous = fit_additive(matrix, hessian, _settings(max_rounds=1), _generator()).losses[1]
    assert fit.losses[-1] < 0.7 * only_continuous


def test_the_tolerance_ends_the_rounds():
    matrix, hessian = problem(64, 32)
    short = fit_additive(matrix, hessian, _settings(relative_tolerance=0.1), _generator())
    full = fit_additive(matrix, hessian, _settings(relative_tolerance=None, max_rounds=12), _generator())
    assert len(short.losses) < len(full.losses) == 14
    assert short.losses[-1] / short.losses[-2] > 0.9
    assert full.losses[-1] < short.losses[-1]


def test_the_same_key_gives_the_same_codes():
    matrix, hessian = problem(32, 16)
    first, second = (fit_additive(matrix, hessian, _settings(), _generator()).weight for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.codebooks, second.codebooks)


def test_dead_inputs_and_singular_hessians():
    matrix, hessian = problem(32, 16, tokens=5)  # rank 5 of 16
    hessian[3], hessian[:, 3] = 0.0, 0.0
    hessian[8:12], hessian[:, 8:12] = 0.0, 0.0  # a whole group
    fit = fit_additive(matrix, hessian, _settings(), _generator())
    assert torch.isfinite(fit.weight.codebooks).all()
    assert fit.losses[-1] < 0.2 * quadratic_error(matrix, hessian)


def test_a_zero_matrix_and_a_zero_row():
    matrix, hessian = problem(16, 16)
    matrix[5] = 0.0
    fit = fit_additive(matrix, hessian, _settings(), _generator())
    assert torch.isfinite(fit.weight.dequantize()).all()
    assert fit.weight.dequantize()[5].abs().max() < 1e-6
    assert fit_additive(torch.zeros(16, 16), hessian, _settings(), _generator()).losses[-1] == pytest.approx(0.0, abs=1e-12)


def test_fewer_groups_than_codewords():
    matrix, hessian = problem(4, 8)
    fit = fit_additive(matrix, hessian, _settings(num_codewords=256), _generator())
    assert fit.weight.codebooks.shape == (2, 256, 1, 4)
    assert fit.losses[-1] == pytest.approx(0.0, abs=1e-8)


def test_a_hessian_that_is_not_finite_is_refused():
    matrix, hessian = problem(4, 8)
    hessian[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit_additive(matrix, hessian, _settings(), _generator())


def test_initial_rows_have_unit_length_after_scaling():
    matrix, _ = problem(8, 16)
    weight = initial_codes(matrix, _settings(num_codewords=4096, num_codebooks=1), _generator())
    torch.testing.assert_close(weight.scales, matrix.norm(dim=1))
    torch.testing.assert_close(weight.dequantize(), matrix)


def test_codebooks_decided_by_a_sample_of_rows_end_nearly_as_good(monkeypatch):
    matrix, hessian = problem(512, 32)
    whole = fit_additive(matrix, hessian, _settings(relative_tolerance=None, max_rounds=8), _generator())
    monkeypatch.setattr("algorithms.numerics.codebooks.additive_fit._GROUPS_PER_CODEWORD", 64)  # 128 of the 512 rows
    sampled = fit_additive(matrix, hessian, _settings(relative_tolerance=None, max_rounds=8), _generator())
    assert not torch.equal(whole.weight.codebooks, sampled.weight.codebooks)
    assert sampled.losses[-1] < 1.05 * whole.losses[-1]
    assert sampled.losses[-1] == pytest.approx(quadratic_error(matrix - sampled.weight.dequantize(), hessian), rel=1e-4)
    # Every reported loss is the true one at that moment: a stale E would show as a loss that the next exact step contradicts.
    assert all(later < 1.02 * earlier for earlier, later in zip(sampled.losses, sampled.losses[1:], strict=False))
