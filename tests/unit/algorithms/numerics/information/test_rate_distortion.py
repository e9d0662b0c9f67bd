import math

import pytest
import torch

from algorithms.numerics.information import rate_distortion
from algorithms.numerics.information.rate_distortion import gaussian_rate, spectrum
from tests.support.matrices import problem


def bisected(eigenvalues, relative_error):
    """The rate by bisection of the water level, in plain floats."""
    wanted = relative_error * sum(eigenvalues) / len(eigenvalues)
    low, high = 0.0, max(eigenvalues)
    for _ in range(200):
        theta = (low + high) / 2
        low, high = (theta, high) if sum(min(theta, v) for v in eigenvalues) / len(eigenvalues) < wanted else (low, theta)
    return sum(0.5 * math.log2(v / theta) for v in eigenvalues if v > theta) / len(eigenvalues)


def test_the_closed_form_of_a_diagonal_hessian():
    """Where no component is drowned, the rate is half the log of the geometric mean over the distortion."""
    diagonal = [4.0, 1.0, 0.25, 2.0]
    error = 0.05
    distortion = error * sum(diagonal) / 4
    assert distortion < min(diagonal)
    expected = 0.5 * (math.log2(math.prod(diagonal)) / 4 - math.log2(distortion))
    assert gaussian_rate(spectrum(torch.diag(torch.tensor(diagonal))), error) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("error", [0.9, 0.5, 0.1, 1e-3, 1e-9])
def test_drowned_components_take_no_bits(error):
    diagonal = [10.0, 3.0, 0.5, 0.01, 0.0]
    assert gaussian_rate(spectrum(torch.diag(torch.tensor(diagonal))), error) == pytest.approx(
        bisected(diagonal, error), rel=1e-6, abs=1e-12
    )


def test_a_rotation_changes_nothing():
    _, hessian = problem(1, 40)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)))
    turned = rotation @ hessian @ rotation.T
    assert gaussian_rate(spectrum(turned), 0.02) == pytest.approx(gaussian_rate(spectrum(hessian), 0.02), rel=1e-3)


def test_independent_inputs_cost_half_a_bit_a_factor_of_two():
    assert gaussian_rate(spectrum(None), 1 / 16) == pytest.approx(2)
    assert gaussian_rate(spectrum(3 * torch.eye(7)), 1 / 16) == pytest.approx(2)


def test_the_ends():
    known = spectrum(torch.diag(torch.tensor([1.0, 2.0])))
    assert gaussian_rate(known, 1.0) == gaussian_rate(known, 3.0) == 0
    assert gaussian_rate(known, 0.0) == math.inf
    assert gaussian_rate(spectrum(torch.zeros(3, 3)), 0.5) == 0


def test_no_quantizer_of_a_gaussian_beats_it():
    """Rounding normal weights to a fine grid costs about a quarter of a bit more (the space-filling loss of a cube)."""
    weights = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 0.25
    codes = (weights / step).round()
    _, counts = codes.unique(return_counts=True)
    share = counts.double() / codes.numel()
    entropy = -(share * share.log2()).sum().item()
    error = ((codes * step - weights).square().sum() / weights.square().sum()).item()
    assert entropy - gaussian_rate(spectrum(None), error) == pytest.approx(0.2546, abs=0.01)


@pytest.mark.parametrize("error", [0.3, 0.03, 0.003])
def test_the_estimate_of_a_large_spectrum_is_close(monkeypatch, error):
    _, hessian = problem(1, 600)
    exact = gaussian_rate(spectrum(hessian), error)
    monkeypatch.setattr(rate_distortion, "EXACT_UP_TO", 100)
    estimate = spectrum(hessian)
    assert estimate.values.numel() < 600
    assert estimate.shares.sum().item() == pytest.approx(1)
    assert gaussian_rate(estimate, error) == pytest.approx(exact, abs=0.03)


def test_the_estimate_of_few_distinct_eigenvalues_ends_early(monkeypatch):
    monkeypatch.setattr(rate_distortion, "EXACT_UP_TO", 4)
    hessian = torch.diag(torch.tensor([1.0, 4.0]).repeat(50))
    assert gaussian_rate(spectrum(hessian), 0.1) == pytest.approx(bisected([1.0, 4.0], 0.1), abs=0.02)
