"""NormalFloat codes of residuals (QLoRA, arXiv 2305.14314): values that split a normal distribution evenly, at block scales.

A code is one of 2^b values that are the same for every matrix; runs of 64 columns of a row share a scale, which starts as their
largest magnitude and is stored in two levels. Columns go through the sweep: later ones make up for errors of earlier ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from algorithms.numerics.residuals.coder import CodedResidual, stored_bits
from algorithms.numerics.residuals.vector_codes import (
    assembled,
    packed_codes,
    packed_scales,
    spread_scales,
    tile_of,
    two_level,
    unpacked_codes,
    unpacked_scales,
)
from algorithms.numerics.residuals.vector_columns import Problem, VectorColumns
from algorithms.numerics.residuals.vq import CachedFactor
from algorithms.numerics.sparse_quantized import Statistics

# QLoRA's: the outermost values stand for the mass beyond this quantile, the mean of 1 - 1/30 and 1 - 1/32.
_OFFSET = 0.9677083
_TILE_COLUMNS = 64
_SMALLEST_SCALE = 1e-9
# Shares of the largest magnitude that are tried as a scale: few bits are better spent on the many small values.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def normal_float(bits: int) -> Tensor:
    """The table of 2^bits values, rising, from -1 to 1 with a zero.

    Quantiles of the normal distribution at even distances: 2^(bits - 1) positive ones, one fewer negative.

    Args:
        bits: 2 to 4.
    """
    half = 1 << (bits - 1)
    ends = torch.linspace(_OFFSET, 0.5, half + 1, dtype=torch.float64), torch.linspace(_OFFSET, 0.5, half, dtype=torch.float64)
    positive, negative = (torch.special.ndtri(end)[:-1] for end in ends)
    return torch.cat([-negative / negative.max(), negative.new_zeros(1), positive.flip(0) / positive.max()]).float()


@dataclass(frozen=True, kw_only=True)
class NormalFloatCodes:
    """Codes [O, I] int64 of ``bits`` bits and two-level ``scales`` of [O * T, 1], T runs of columns a row."""

    codes: Tensor
    scales: Statistics
    bits_a_code: int

    @property
    def tiles(self) -> int:
        """T."""
        assert self.scales.codes is not None
        return self.scales.codes.shape[0] // self.codes.shape[0]

    def movable(self) -> dict[str, Tensor]:
        """The scales [O, T]."""
        return {"scales": self.scales.decode().view(-1, self.tiles)}

    def decode(self, values: Mapping[str, Tensor]) -> Tensor:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        table = normal_float(self.bits_a_code).to(self.codes.device)[:, None]
        return assembled(table, self.codes, spread_scales(values["scales"], self.codes.shape, None), self.codes.shape[0])

    def moved(self, values: Mapping[str, Tensor]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        return type(self)(codes=self.codes, scales=two_level(values["scales"]), bits_a_code=self.bits_a_code)

    def dequantize(self) -> Tensor:
        """The matrix [O, I] float32."""
        return self.decode(self.movable())

    def bits(self) -> Mapping[str, int]:
        """Codes, and scales with their second level."""
        sizes = {name: stored_bits(tensor) for name, tensor in self.tensors().items()}
        return {"codes": sizes.pop("codes"), "scales": sum(sizes.values())}

    def tensors(self) -> dict[str, Tensor]:
        """``codes`` as a bit stream, and scales."""
        return {**packed_codes(self.codes, self.bits_a_code), **packed_scales(self.scales)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        # A stream is a whole number of words, less than one of which is filling.
        bits = stored_bits(tensors["codes"]) // (shape[0] * shape[1])
        return cls(codes=unpacked_codes(tensors, bits, shape), scales=unpacked_scales(tensors), bits_a_code=bits)


class TableColumns(VectorColumns):
    """Columns by a rising table [K, 1]: the nearest value is found between two middles, in a fraction of a search's time."""

    def __init__(self, book: Tensor, scales: Tensor) -> None:
        super().__init__(book, scales)
        self._values = book[:, 0]
        self._middles = (self._values[1:] + self._values[:-1]) / 2

    def requantize(self, place: int, column: Tensor) -> Tensor:
        """The column [O] by its nearest values."""
        codes = torch.bucketize(column / self._divisors[place], self._middles)
        self.codes[place] = codes
        return self._values[codes] * self._scales[place]


class NormalFloatCoder:
    """See :class:`algorithms.numerics.residuals.coder.ResidualCoder`.

    Args:
        bits: of a code.
        rounds: of scales and codes after the sweep; without any, its codes stay.
    """

    def __init__(self, bits: int, rounds: int = 1) -> None:
        self._bits, self._rounds = bits, rounds
        self._factors = CachedFactor()

    def encode(
        self,
        residual: Tensor,
        hessian: Tensor | None,
        generator: torch.Generator,
        previous: CodedResidual | None = None,
    ) -> NormalFloatCodes:
        """Code one residual; nothing is random, and earlier codings are ignored."""
        factor, order = self._factors.of(hessian, residual.shape[1], residual)
        table = normal_float(self._bits).to(residual.device)
        tiles = -(-residual.shape[1] // _TILE_COLUMNS)
        costs = factor.pivots.reciprocal().square()[torch.argsort(order)]
        scales = two_level(_best_scales(residual, table, tiles, costs)).decode().view(-1, tiles)
        quantizer = TableColumns(table[:, None], spread_scales(scales, residual.shape, None).T[order].contiguous())
        problem = Problem(columns=residual[:, order].T.contiguous(), factor=factor)
        problem.sweep(quantizer)
        for _ in range(self._rounds):
            problem.solve_scales(quantizer)
            problem.refine(quantizer)
        back = torch.argsort(order)
        tile = tile_of(residual.shape[1], tiles, residual.device).expand(residual.shape)
        stored = two_level(scales.new_zeros(scales.shape).scatter_(1, tile, quantizer.scales[back].T))
        known = stored.decode().view(-1, tiles)
        quantizer.scales = spread_scales(known, residual.shape, None).T[order].contiguous()
        if self._rounds:
            problem.refine(quantizer)
        return NormalFloatCodes(codes=quantizer.codes[back].T.contiguous(), scales=stored, bits_a_code=self._bits)


def _best_scales(matrix: Tensor, table: Tensor, tiles: int, costs: Tensor) -> Tensor:
    """The scale of every tile, [O, T], of shares of its largest magnitude: least error, columns weighted by ``costs`` [I]."""
    tile = tile_of(matrix.shape[1], tiles, matrix.device).expand(matrix.shape)
    largest = matrix.new_zeros(matrix.shape[0], tiles).scatter_reduce_(1, tile, matrix.abs(), "amax").clamp(min=_SMALLEST_SCALE)
    best, lowest = largest, torch.full_like(largest, torch.inf)
    middles = (table[1:] + table[:-1]) / 2
    for share in _SHARES:
        scales = (share * largest).gather(1, tile)
        difference = matrix - table[torch.bucketize(matrix / scales, middles)] * scales
        error = torch.zeros_like(largest).scatter_add_(1, tile, difference.square() * costs)
        best, lowest = torch.where(error < lowest, share * largest, best), torch.minimum(error, lowest)
    return best
