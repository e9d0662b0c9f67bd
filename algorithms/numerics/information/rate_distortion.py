"""How many bits a weight needs at least for an error, were it Gaussian: the rate-distortion function by reverse water-filling.

A weight vector w of independent normal entries whose error is measured by <dw H, dw> is, in the axes of H, a vector of normal
components with variances in proportion to the eigenvalues of H, each measured by its square. For those the rate is known (Cover
and Thomas, Elements of Information Theory, theorem 10.3.3): all components get the same error theta, or their whole variance
where that is less, and

    D(theta) = sum_i min(theta, lambda_i)        R(theta) = 1/2 sum_i max(0, log2(lambda_i / theta)).

Trained weights are no such vector: they may be cheaper than this. It is a line to measure by, not a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.randomness import keyed_generator

# Up to this size all eigenvalues are computed; above, their distribution is estimated, which costs a few products with H.
EXACT_UP_TO = 1024
_STEPS = 48
_PROBES = 4


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The distribution of the eigenvalues of H: ``values`` [k], not negative, with ``shares`` [k] that sum to 1; float64."""

    values: Tensor
    shares: Tensor


def spectrum(hessian: Tensor | None) -> Spectrum:
    """The spectrum of H [I, I]; None is the identity.

    Beyond ``EXACT_UP_TO``, stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017): averages over eigenvalues of smooth
    functions come out to about 1 / sqrt(I * probes) of their spread.
    """
    if hessian is None:
        one = torch.ones(1, dtype=torch.float64)
        return Spectrum(values=one, shares=one)
    size = hessian.shape[0]
    if size <= EXACT_UP_TO:
        values = torch.linalg.eigvalsh(hessian.double()).clamp_(min=0).cpu()
        return Spectrum(values=values, shares=torch.full_like(values, 1 / size))
    pairs = [_ritz(hessian, probe) for probe in range(_PROBES)]
    return Spectrum(
        values=torch.cat([values for values, _ in pairs]).clamp_(min=0),
        shares=torch.cat([shares for _, shares in pairs]) / _PROBES,
    )


def gaussian_rate(known: Spectrum, relative_error: float) -> float:
    """Bits a weight at which the error is ``relative_error`` of the squared output <w H, w>; infinite for no error at all.

    An error of the whole output or more takes no bits.
    """
    mean = (known.shares * known.values).sum().item()
    if relative_error >= 1 or mean <= 0:
        return 0.0
    if relative_error <= 0 or math.isnan(relative_error):
        return math.inf
    theta = _water_level(known, relative_error * mean)
    above = known.values > theta
    return 0.5 * (known.shares[above] * torch.log2(known.values[above] / theta)).sum().item()


def rates(hessian: Tensor | None, relative_errors: Mapping[str, float]) -> dict[str, float | None]:
    """:func:`gaussian_rate` of several matrices with a common input; None where an error is too small to have a finite one."""
    known = spectrum(hessian)
    found = {name: gaussian_rate(known, error) for name, error in relative_errors.items()}
    return {name: rate if math.isfinite(rate) else None for name, rate in found.items()}


def _water_level(known: Spectrum, distortion: float) -> float:
    """Theta with sum_i share_i min(theta, lambda_i) = distortion: linear between eigenvalues, so solved exactly."""
    values, order = known.values.sort()
    shares = known.shares[order]
    below = torch.cumsum(shares * values, dim=0)
    # With theta at the k-th smallest value, what lies below it counts fully and the rest up to theta.
    reached = below + (1 - torch.cumsum(shares, dim=0)) * values
    place = int(torch.searchsorted(reached, distortion).item())
    if place >= values.numel():
        return values[-1].item()
    before = below[place - 1].item() if place else 0.0
    rest = 1 - (torch.cumsum(shares, dim=0)[place - 1].item() if place else 0.0)
    return (distortion - before) / rest


def _ritz(hessian: Tensor, probe: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of one Lanczos run from a random vector of signs, with full reorthogonalisation."""
    size = hessian.shape[0]
    generator = keyed_generator(0, "spectrum", size, probe)
    signs = torch.randint(2, (size,), generator=generator).to(hessian.device, hessian.dtype) * 2 - 1
    vector = signs / math.sqrt(size)
    basis = hessian.new_zeros(_STEPS, size)
    diagonal, beside = [], []
    for step in range(_STEPS):
        basis[step] = vector
        product = hessian @ vector
        diagonal.append((product @ vector).item())
        product -= basis[: step + 1].T @ (basis[: step + 1] @ product)
        product -= basis[: step + 1].T @ (basis[: step + 1] @ product)  # twice is enough
        length = product.norm().item()
        if step + 1 == _STEPS or length <= 1e-6 * max(map(abs, diagonal)):
            break
        beside.append(length)
        vector = product / length
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        sides = torch.tensor(beside, dtype=torch.float64)
        tridiagonal += torch.diag(sides, 1) + torch.diag(sides, -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return values, vectors[0].square()
