"""Vector quantization of residuals (ReALLM, arXiv 2405.13155): one codebook a matrix, fitted and searched under the Hessian.

Vectors are neighbouring rows of one column, as in ReALLM; unlike there, columns are coded one after another by the column
sweep, so that later ones make up for the errors of earlier ones, and codes, codewords and scales are then improved in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.codebooks.kmeans import kmeans
from algorithms.numerics.column_sweep import Factor, inverse_factor
from algorithms.numerics.residuals.coder import CodedResidual
from algorithms.numerics.residuals.permutation import similar_columns
from algorithms.numerics.residuals.vector_codes import BLOCK_ROWS, VectorCodes, spread_scales, tile_of, two_level
from algorithms.numerics.residuals.vector_columns import Problem, VectorColumns, padded_rows

_SMALLEST_SCALE = 1e-9
# More points move k-means' centres by less than the first solve of the codebook does.
_POINTS_PER_CODEWORD = 256
_KMEANS_ITERATIONS = 20
# Columns of a tile where columns are permuted; otherwise a tile is as wide as the matrix (this project's plugin compares both).
_TILE_COLUMNS = 64
DAMPING = 0.01


class CachedFactor:
    """The factor of the Hessian that was asked for last, and its order of columns: many residuals are coded under one."""

    def __init__(self) -> None:
        self._hessian: Tensor | None = None
        self._found: tuple[Factor, Tensor] | None = None

    def of(self, hessian: Tensor | None, columns: int, like: Tensor) -> tuple[Factor, Tensor]:
        """Factor, and columns [I] by falling diagonal of H; None stands for the identity."""
        if self._found is None or hessian is not self._hessian or self._found[1].shape[0] != columns:
            wide = torch.eye(columns, device=like.device) if hessian is None else hessian
            order = torch.argsort(wide.diagonal(), descending=True, stable=True)
            self._found, self._hessian = (inverse_factor(wide, DAMPING, order), order), hessian
        return self._found


@dataclass(frozen=True, kw_only=True)
class VectorSettings:
    """``code_bits`` for every vector of ``bucket`` rows; ``permutes`` orders columns by likeness, in blocks of 64 rows.

    ``rounds`` of codewords, scales and codes follow the sweep; without any, its codes stay. ``book_iterations`` bound k-means.
    """

    code_bits: int
    bucket: int
    permutes: bool = False
    rounds: int = 1
    book_iterations: int = _KMEANS_ITERATIONS


class VectorCoder:
    """See :class:`algorithms.numerics.residuals.coder.ResidualCoder`.

    Args:
        settings: sizes.
    """

    def __init__(self, settings: VectorSettings) -> None:
        self._settings = settings
        self._factors = CachedFactor()

    def encode(
        self,
        residual: Tensor,
        hessian: Tensor | None,
        generator: torch.Generator,
        previous: CodedResidual | None = None,
    ) -> VectorCodes:
        """Code one residual; an earlier coding gives the codebook, and the order of columns.

        Its codes are not gone on from: a new sweep finds more than old codes that are improved, which end where they began.
        """
        settings = self._settings
        factor, order = self._factors.of(hessian, residual.shape[1], residual)
        padded = padded_rows(residual, settings.bucket)
        start = previous if isinstance(previous, VectorCodes) else None
        place = _Places(padded, settings, start)
        scales = place.scales(padded)
        if start is None:
            points = _vectors(padded, settings.bucket) / spread_scales(scales, place.shape, place.order)[..., None]
            book = _first_book(points.flatten(0, 1), settings, generator)
        else:
            book = start.book
        problem = Problem(columns=padded[:, order].T.contiguous(), factor=factor)
        quantizer = VectorColumns(book, spread_scales(scales, place.shape, place.order).T[order].contiguous())
        problem.sweep(quantizer)
        for _ in range(settings.rounds):
            problem.solve_book(quantizer)
            problem.solve_scales(quantizer)
            problem.refine(quantizer)
        return _stored(problem, quantizer, place, order, residual.shape[0], refines=settings.rounds > 0)


class _Places:
    """Which vectors there are, and which tile each belongs to."""

    def __init__(self, padded: Tensor, settings: VectorSettings, start: VectorCodes | None) -> None:
        self.shape = torch.Size((padded.shape[0] // settings.bucket, padded.shape[1]))
        self.tiles = -(-padded.shape[1] // _TILE_COLUMNS) if settings.permutes else 1
        self.order: Tensor | None = None
        if settings.permutes:
            rows = max(1, BLOCK_ROWS // settings.bucket) * settings.bucket
            self.order = similar_columns(padded, rows) if start is None else start.order

    def scales(self, padded: Tensor) -> Tensor:
        """The root mean square of every tile, [n, T], as it is stored."""
        vectors, columns = self.shape
        squares = padded.view(vectors, -1, columns).square().mean(1)
        tile = tile_of(columns, self.tiles, padded.device)
        places = tile.expand(self.shape) if self.order is None else self._in_order(tile)
        counts = torch.bincount(tile, minlength=self.tiles)
        means = squares.new_zeros(vectors, self.tiles).scatter_add_(1, places, squares) / counts
        return two_level(means.sqrt().clamp(min=_SMALLEST_SCALE)).decode().view(vectors, self.tiles)

    def tiles_of(self, scales: Tensor) -> Tensor:
        """Scales of vectors [n, I], equal within tiles, as those of the tiles [n, T]."""
        tile = tile_of(self.shape[1], self.tiles, scales.device)
        places = tile.expand(self.shape) if self.order is None else self._in_order(tile)
        return scales.new_zeros(self.shape[0], self.tiles).scatter_(1, places, scales)

    def _in_order(self, tile: Tensor) -> Tensor:
        assert self.order is not None
        in_block = torch.empty_like(self.order).scatter_(1, self.order, tile.expand_as(self.order))
        return in_block.repeat_interleave(-(-self.shape[0] // self.order.shape[0]), 0)[: self.shape[0]]


def _vectors(padded: Tensor, bucket: int) -> Tensor:
    """All vectors [n, I, b]."""
    return padded.view(-1, bucket, padded.shape[1]).transpose(1, 2)


def _first_book(points: Tensor, settings: VectorSettings, generator: torch.Generator) -> Tensor:
    size = 1 << settings.code_bits
    if points.shape[0] > _POINTS_PER_CODEWORD * size:
        chosen = torch.randperm(points.shape[0], generator=generator)[: _POINTS_PER_CODEWORD * size]
        points = points[chosen.to(points.device)]
    return kmeans(points, size, max_iterations=settings.book_iterations, generator=generator)


def _stored(
    problem: Problem, quantizer: VectorColumns, place: _Places, order: Tensor, rows: int, *, refines: bool
) -> VectorCodes:
    """Codebook and scales as they are stored, and codes that are chosen again for them where one ``refines``."""
    back = torch.argsort(order)
    scales = two_level(place.tiles_of(quantizer.scales[back].T))
    quantizer.book = quantizer.book.half().float()
    known = spread_scales(scales.decode().view(-1, place.tiles), place.shape, place.order)
    quantizer.scales = known.T[order].contiguous()
    if refines:
        problem.refine(quantizer)
    return VectorCodes(
        codes=quantizer.codes[back].T.contiguous(), book=quantizer.book, scales=scales, rows=rows, order=place.order
    )
