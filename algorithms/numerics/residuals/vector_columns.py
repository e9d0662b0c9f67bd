"""Vectors of neighbouring rows in the column sweep, and exact steps for the codebook and the scales that they share.

Legend: O out_features and I in_features, b rows a vector, n = O/b vectors a column, K codewords. A column of the sweep is n
whole vectors, so that one error measure, a number, holds for all elements of each: the nearest codeword is the best one.

    W_hat[j, v] = scales[j, v] * book[codes[j, v]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import CodewordScatter
from algorithms.numerics.codebooks.nearest import lowest_score
from algorithms.numerics.column_sweep import Factor, refine, sweep

_SMALLEST = 1e-12
_FEW_SCORES = 1 << 18  # that stay in cache together
_SOLVER_ITERATIONS = 8
# Past this drop of the preconditioned residual (squared), float32 rounding steers the iteration, and it can diverge.
_EXHAUSTED = 1e-9
# A scale moves by no more than this factor at once: where a vector has hardly any input, its best scale is noise.
_LARGEST_MOVE = 2.0


class VectorColumns:
    """See :class:`algorithms.numerics.column_sweep.ColumnQuantizer`: each column by one codebook, at scales that are given.

    Args:
        book: [K, b].
        scales: [I, n], in the order of the sweep.
    """

    group_size = 1

    def __init__(self, book: Tensor, scales: Tensor) -> None:
        self.book, self.scales = book, scales
        self.codes = torch.zeros(scales.shape, dtype=torch.int64, device=scales.device)

    @property
    def book(self) -> Tensor:
        """[K, b]."""
        return self._book

    @book.setter
    def book(self, book: Tensor) -> None:
        """Other codewords [K, b]."""
        # Columns of small matrices take longer to prepare than to search: what all of them need is kept.
        self._book, self._squares = book, book.square().sum(1)

    @property
    def scales(self) -> Tensor:
        """[I, n]."""
        return self._scales

    @scales.setter
    def scales(self, scales: Tensor) -> None:
        """Other scales [I, n]."""
        # A scale of zero makes any codeword zero.
        self._scales, self._divisors = scales, torch.where(scales.abs() < _SMALLEST, _SMALLEST, scales)

    def begin_group(self, start: int, columns: Tensor, pivots: Tensor) -> None:
        """Scales are fixed before: there is nothing to fit."""

    def quantize(self, place: int, column: Tensor, pivot: Tensor) -> Tensor:
        """The column [O] by its nearest codewords."""
        return self.requantize(place, column)

    def requantize(self, place: int, column: Tensor) -> Tensor:
        """The column [O] by its nearest codewords."""
        vectors = column.view(-1, self._book.shape[1]) / self._divisors[place][:, None]
        if vectors.shape[0] * self._book.shape[0] <= _FEW_SCORES:
            scores = torch.addmm(self._squares[:, None], self._book, vectors.T, alpha=-2)
            codes = torch.min(scores, 0)[1]  # along the words a minimum is vectorised, its index included
        else:
            codes = lowest_score(vectors, self._book, self._squares)[1]
        self.codes[place] = codes
        return (self._book[codes] * self._scales[place][:, None]).view(-1)

    def values(self) -> Tensor:
        """All columns as they are now, [I, O]."""
        return (self.book[self.codes] * self.scales[..., None]).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """``columns`` [I, O] that are wanted, in the order of the sweep, and the ``factor`` of H in the same order."""

    columns: Tensor
    factor: Factor

    def sweep(self, quantizer: VectorColumns) -> None:
        """Choose all codes anew, from the first column to the last."""
        sweep(self.columns, self.factor, quantizer)

    def refine(self, quantizer: VectorColumns) -> None:
        """One pass of coordinate descent over the codes."""
        refine(self.columns, quantizer.values(), self.factor.hessian, quantizer)

    def loss(self, quantizer: VectorColumns) -> float:
        """<dW H, dW>."""
        difference = self.columns - quantizer.values()
        return torch.sum((self.factor.hessian @ difference).double() * difference).item()

    def solve_book(self, quantizer: VectorColumns) -> None:
        """Lower the loss over all codewords at once: conjugate gradients, from the present ones.

        Codewords that no vector uses stay as they are. The loss falls with every iteration.
        """
        hessian, scales, codes = self.factor.hessian, quantizer.scales, quantizer.codes
        scatter = CodewordScatter(codes.reshape(-1, 1), quantizer.book.shape[0])

        def _adjoint(columns: Tensor) -> Tensor:
            return scatter((columns.view(*codes.shape, -1) * scales[..., None]).flatten(0, 1))

        error = self.columns - quantizer.values()
        energy = (scales.square() * hessian.diagonal()[:, None]).reshape(-1, 1)
        weights = scatter(energy).clamp(min=_SMALLEST)
        solution, residual = quantizer.book, _adjoint(hessian @ error)
        direction = preconditioned = residual / weights
        power = torch.sum(residual * preconditioned)
        exhausted = _EXHAUSTED * power
        for _ in range(_SOLVER_ITERATIONS):
            product = _adjoint(hessian @ (direction[codes] * scales[..., None]).flatten(1))
            curvature = torch.sum(direction * product)
            if not (curvature > 0 and power > exhausted):
                break
            length = power / curvature
            solution = solution + length * direction
            residual = residual - length * product
            preconditioned = residual / weights
            new_power = torch.sum(residual * preconditioned)
            direction = preconditioned + (new_power / power) * direction
            power = new_power
        quantizer.book = solution

    def solve_scales(self, quantizer: VectorColumns) -> None:
        """The best common factor of every row of vectors, in closed form."""
        values = quantizer.values()
        smoothed = (self.factor.hessian @ values).view(*quantizer.codes.shape, -1)
        wanted = torch.sum(smoothed * self.columns.view_as(smoothed), dim=(0, 2))
        power = torch.sum(smoothed * values.view_as(smoothed), dim=(0, 2))
        factor = torch.where(power > 0, wanted / power, torch.ones_like(power))
        quantizer.scales = quantizer.scales * factor.clamp(1 / _LARGEST_MOVE, _LARGEST_MOVE)


def padded_rows(matrix: Tensor, rows: int) -> Tensor:
    """A matrix [O, I] with rows of zeros after its last, so that ``rows`` divides their number."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % rows))
