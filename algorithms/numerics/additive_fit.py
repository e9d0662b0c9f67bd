"""Additive codebooks for one matrix: initialisation, then exact continuous steps in turn with a search over the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.additive import AdditiveCodes, group
from algorithms.numerics.code_search import beam_search, coordinate_descent
from algorithms.numerics.codebook_fit import solve_codebooks, solve_scales
from algorithms.numerics.kmeans import residual_kmeans

_SMALLEST_SCALE = 1e-9


@dataclass(frozen=True, kw_only=True)
class AdditiveSettings:
    """How to fit additive codebooks to a matrix.

    ``relative_tolerance`` ends the alternation when a round gains less than this share of the loss (None: never).
    ``solver_iterations`` bounds the conjugate gradient iterations of a round, ``max_points`` the points k-means starts from.
    """

    num_codebooks: int
    num_codewords: int
    group_shape: tuple[int, int]
    beam_size: int = 1
    init_iterations: int = 100
    max_points: int | None = None
    max_rounds: int = 100
    solver_iterations: int = 12
    relative_tolerance: float | None = 0.01


@dataclass(frozen=True, kw_only=True)
class AdditiveFit:
    """A fitted matrix and its losses <dW H, dW>, after initialisation and after each continuous step."""

    weight: AdditiveCodes
    losses: Sequence[float]


def fit_additive(matrix: Tensor, hessian: Tensor, settings: AdditiveSettings, generator: torch.Generator) -> AdditiveFit:
    """Minimise <dW H, dW> over codes, codebooks and scales (AQLM, arXiv 2401.06118, section 3; spec of the objective).

    Each round solves the codebooks (conjugate gradients), the scales (closed form) and then searches the codes given both.

    Args:
        matrix: W, [O, I] float32; O and I are multiples of the group shape.
        hessian: H, [I, I] float32, symmetric and positive semidefinite; dead inputs (zero rows) are allowed.
        settings: sizes and limits.
        generator: decides k-means' starting points and the order of the search.

    Raises:
        ValueError: a Hessian with NaN or infinity.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian of this layer holds NaN or infinity; compute the calibration in a wider dtype")
    weight = initial_codes(matrix, settings, generator)
    error = (matrix - weight.dequantize()) @ hessian
    losses = [_loss(matrix, weight, error)]
    for _ in range(settings.max_rounds):
        weight, error = _continuous_step(weight, error, matrix, hessian, settings.solver_iterations)
        losses.append(_loss(matrix, weight, error))
        if _converged(losses, settings.relative_tolerance):
            return AdditiveFit(weight=weight, losses=losses)
        if settings.beam_size > 1:
            codes, error = beam_search(weight, error, matrix, hessian, beam_size=settings.beam_size, generator=generator)
        else:
            codes, error = coordinate_descent(weight, error, hessian, generator=generator)
        weight = weight.replace(codes=codes)
    weight, error = _continuous_step(weight, error, matrix, hessian, settings.solver_iterations)
    return AdditiveFit(weight=weight, losses=[*losses, _loss(matrix, weight, error)])


def initial_codes(matrix: Tensor, settings: AdditiveSettings, generator: torch.Generator) -> AdditiveCodes:
    """Residual k-means on the rows scaled to unit length; a matrix with fewer groups than codewords gets zero codewords."""
    og, ig = settings.group_shape
    scales = matrix.view(-1, og * matrix.shape[1]).norm(dim=1) + _SMALLEST_SCALE
    tiles = group(matrix / scales.repeat_interleave(og)[:, None], settings.group_shape)
    codebooks, codes = residual_kmeans(
        tiles.flatten(0, 1),
        settings.num_codebooks,
        settings.num_codewords,
        max_iterations=settings.init_iterations,
        max_points=settings.max_points,
        generator=generator,
    )
    return AdditiveCodes(
        codes=codes.view(*tiles.shape[:2], settings.num_codebooks),
        codebooks=codebooks.view(settings.num_codebooks, settings.num_codewords, og, ig),
        scales=scales,
    )


def _continuous_step(
    weight: AdditiveCodes, error: Tensor, matrix: Tensor, hessian: Tensor, iterations: int
) -> tuple[AdditiveCodes, Tensor]:
    codebooks, _ = solve_codebooks(weight, error, hessian, iterations=iterations)
    weight = weight.replace(codebooks=codebooks)
    scales, error = solve_scales(weight, matrix, hessian)
    return weight.replace(scales=scales), error


def _loss(matrix: Tensor, weight: AdditiveCodes, error: Tensor) -> float:
    return torch.sum(error.double() * (matrix - weight.dequantize()).double()).item()


def _converged(losses: Sequence[float], tolerance: float | None) -> bool:
    if losses[-1] <= 0:
        return True
    # The first entry is k-means, which the first solve always improves on: it says nothing about the alternation.
    return tolerance is not None and len(losses) > 2 and losses[-1] > (1 - tolerance) * losses[-2]
