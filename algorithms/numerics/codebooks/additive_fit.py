"""Additive codebooks for one matrix: initialisation, then exact continuous steps in turn with a search over the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import AdditiveCodes, group
from algorithms.numerics.codebooks.code_search import beam_search, coordinate_descent
from algorithms.numerics.codebooks.codebook_fit import solve_codebooks, solve_scales
from algorithms.numerics.codebooks.kmeans import residual_kmeans
from algorithms.numerics.spread import WHOLE, Spread

_SMALLEST_SCALE = 1e-9
# With this many groups a codeword, the codebooks of a sample cost less than 0.5 % of the loss and a fraction of the time.
_GROUPS_PER_CODEWORD = 1024


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
    solver_iterations: int = 4
    relative_tolerance: float | None = 0.01


@dataclass(frozen=True, kw_only=True)
class AdditiveFit:
    """A fitted matrix and its losses <dW H, dW>, after initialisation and after each continuous step.

    Of a matrix spread over processes, codes and scales are those of the process's rows, losses those of all rows.
    """

    weight: AdditiveCodes
    losses: Sequence[float]


def fit_additive(
    matrix: Tensor, hessian: Tensor, settings: AdditiveSettings, generator: torch.Generator, spread: Spread = WHOLE
) -> AdditiveFit:
    """Minimise <dW H, dW> over codes, codebooks and scales (AQLM, arXiv 2401.06118, section 3; spec of the objective).

    Each round solves the codebooks (conjugate gradients), the scales (closed form) and then searches the codes given both.

    Args:
        matrix: W, [O, I] float32; O and I are multiples of the group shape.
        hessian: H, [I, I] float32, symmetric and positive semidefinite; dead inputs (zero rows) are allowed.
        settings: sizes and limits.
        generator: decides k-means' starting points and the order of the search.
        spread: over processes, of the rows of W; each process has one output group at least.

    Raises:
        ValueError: a Hessian with NaN or infinity.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian of this layer holds NaN or infinity: its inputs are too large for float32")
    weight = initial_codes(matrix, settings, generator, spread)
    problem = _Problem(matrix, hessian, settings, generator, spread)
    error = (matrix - weight.dequantize()) @ hessian
    losses = [problem.loss(weight, error)]
    for _ in range(settings.max_rounds):
        weight, error = problem.continuous_step(weight, error, on_sample=True)
        losses.append(problem.loss(weight, error))
        if _converged(losses, settings.relative_tolerance):
            break
        codes, error = problem.search(weight, error)
        weight = weight.replace(codes=codes)
    weight, error = problem.continuous_step(weight, error, on_sample=False)
    return AdditiveFit(weight=weight, losses=[*losses, problem.loss(weight, error)])


class _Problem:
    """One matrix and its Hessian, with W H computed once."""

    def __init__(
        self, matrix: Tensor, hessian: Tensor, settings: AdditiveSettings, generator: torch.Generator, spread: Spread
    ) -> None:
        self._matrix = matrix
        self._hessian = hessian
        self._smoothed = matrix @ hessian
        self._settings = settings
        self._generator = generator
        self._spread = spread
        og, ig = settings.group_shape
        ni = matrix.shape[1] // ig
        self._first, self._no = spread.number(matrix[::og])
        self._sample = -(-_GROUPS_PER_CODEWORD * settings.num_codewords // ni)

    def continuous_step(self, weight: AdditiveCodes, error: Tensor, *, on_sample: bool) -> tuple[AdditiveCodes, Tensor]:
        """Codebooks, then scales; returns both in a new weight, with its error.

        ``on_sample`` lets a sample of the output groups decide the codebooks, where there are enough of them.
        """
        iterations = self._settings.solver_iterations
        if on_sample and self._sample <= self._no // 2:
            weight = weight.replace(codebooks=self._solve_on_sample(weight, error))
            error = (self._matrix - weight.dequantize()) @ self._hessian
        else:
            codebooks, error = solve_codebooks(weight, error, self._hessian, iterations=iterations, spread=self._spread)
            weight = weight.replace(codebooks=codebooks)
        scales, error = solve_scales(weight, self._matrix, self._smoothed, error)
        return weight.replace(scales=scales), error

    def search(self, weight: AdditiveCodes, error: Tensor) -> tuple[Tensor, Tensor]:
        """One sweep over the codes; returns them with their error."""
        if self._settings.beam_size > 1:
            size = self._settings.beam_size
            return beam_search(weight, error, self._matrix, self._hessian, beam_size=size, generator=self._generator)
        return coordinate_descent(weight, error, self._hessian, generator=self._generator)

    def loss(self, weight: AdditiveCodes, error: Tensor) -> float:
        """<dW H, dW> from E = dW H."""
        total = torch.sum(error.double() * (self._matrix - weight.dequantize()).double())
        self._spread.sum_(total)
        return total.item()

    def _solve_on_sample(self, weight: AdditiveCodes, error: Tensor) -> Tensor:
        og = self._settings.group_shape[0]
        chosen = torch.randperm(self._no, generator=self._generator)[: self._sample]
        chosen = self._spread.own(chosen, weight.scales, self._first)
        part = weight.replace(codes=weight.codes[chosen], scales=weight.scales[chosen])
        rows = error.view(weight.scales.shape[0], og, -1)[chosen].flatten(0, 1)
        iterations = self._settings.solver_iterations
        codebooks, _ = solve_codebooks(part, rows, self._hessian, iterations=iterations, spread=self._spread)
        return codebooks


def initial_codes(
    matrix: Tensor, settings: AdditiveSettings, generator: torch.Generator, spread: Spread = WHOLE
) -> AdditiveCodes:
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
        spread=spread,
    )
    return AdditiveCodes(
        codes=codes.view(*tiles.shape[:2], settings.num_codebooks),
        codebooks=codebooks.view(settings.num_codebooks, settings.num_codewords, og, ig),
        scales=scales,
    )


def _converged(losses: Sequence[float], tolerance: float | None) -> bool:
    if losses[-1] <= 0:
        return True
    # The first entry is k-means, which the first solve always improves on: it says nothing about the alternation.
    return tolerance is not None and len(losses) > 2 and losses[-1] > (1 - tolerance) * losses[-2]
