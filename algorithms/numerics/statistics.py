"""Statistics of the inputs of linear layers, gathered token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Least share of the mean diagonal of H that is added before it is inverted: directions that the calibration text hardly shows
# carry no evidence of how to correct a weight along them. With few tokens for each input feature the share is their inverse.
_RIDGE = 0.01
# Length of a token's vector; squares of more do not add up in float32, and no model that computes in half precision has them.
_LARGEST = 1e15
# Columns whose products with themselves and all later ones are taken at once: narrower panels compute less twice, wider ones
# keep the product efficient.
_GRAM_PANEL = 128


class InputStatistics:
    """Streaming mean of x x^T over tokens: the project's one Hessian convention, H = E[x x^T], without a factor 2.

    With ``out_features``, tokens may come with the output t that the layer is wanted to have for them, and E[t x^T] is gathered
    from those. Products are taken in float32 and summed in float64: the result does not depend on how the tokens were batched
    beyond float32 rounding of one batch. Tokens that are not :func:`is_usable` are left out and counted.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu", *, out_features: int | None = None) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._wanted = None if out_features is None else self._sum.new_zeros(out_features, in_features)
        # Sums of x and t over tokens with a wanted output.
        self._first = None if out_features is None else (self._sum.new_zeros(in_features), self._sum.new_zeros(out_features))
        self._unwanted: Tensor | None = None  # the sum over tokens without a wanted output, where others have one
        self.num_tokens = 0
        self.num_corrected = 0  # tokens with a wanted output
        self.num_skipped = 0

    def update(self, inputs: Tensor, wanted: Tensor | None = None) -> None:
        """Add tokens [..., in_features] and, where the statistics gather them, the outputs [..., out_features] wanted for them.

        Raises:
            ValueError: wanted outputs that the statistics do not gather.
        """
        if wanted is not None and self._wanted is None:
            raise ValueError("statistics without out_features take no wanted outputs")
        rows = _rows(inputs)
        outputs = None if wanted is None else _rows(wanted)
        finite = is_usable(rows) if outputs is None else is_usable(rows) & is_usable(outputs)
        if not finite.all():
            self.num_skipped += int((~finite).sum())
            rows, outputs = rows[finite], None if outputs is None else outputs[finite]
        _add_gram(self._total_for(outputs), rows)
        if self._wanted is not None and outputs is not None:
            assert self._first is not None
            self._wanted += outputs.T @ rows
            for total, part in zip(self._first, (rows, outputs), strict=True):
                total += part.sum(0, dtype=torch.float64)
            self.num_corrected += rows.shape[0]
        self.num_tokens += rows.shape[0]

    def add_up(self, sum_: Callable[[Tensor], None]) -> None:
        """Put the sum of what all processes have gathered in the place of what this one has.

        Args:
            sum_: replaces a tensor by its sum over the processes, each of which calls this.
        """
        numbers = [self.num_tokens, self.num_corrected, self.num_skipped, int(self._unwanted is not None)]
        counts = torch.tensor(numbers, device=self._sum.device)
        sum_(counts)
        self.num_tokens, self.num_corrected, self.num_skipped, num_unwanted = counts.tolist()
        if num_unwanted and self._unwanted is None:
            self._unwanted = torch.zeros_like(self._sum)
        for total in (self._sum, self._wanted, self._unwanted, *(self._first or ())):
            if total is not None:
                sum_(total)

    def _total_for(self, outputs: Tensor | None) -> Tensor:
        """The sum that a batch belongs to."""
        if self._wanted is None or outputs is not None:
            return self._sum
        if self._unwanted is None:
            self._unwanted = torch.zeros_like(self._sum)
        return self._unwanted

    def hessian(self) -> Tensor:
        """H [in_features, in_features] in float32; where no token could be used, the identity: all errors count the same.

        Raises:
            ValueError: no token was seen at all.
        """
        if self.num_tokens == 0:
            if self.num_skipped == 0:
                raise ValueError("no token reached this layer: there is nothing to calibrate on")
            return torch.eye(self._sum.shape[0], device=self._sum.device)
        total = self._sum if self._unwanted is None else self._sum + self._unwanted
        return (total / self.num_tokens).float()

    def corrected(self, matrix: Tensor, rows: slice = slice(None)) -> Tensor:
        """The weight that best gives the wanted outputs t from their inputs x; ``matrix`` itself where none were gathered.

        It minimises E|V x - t|^2 plus a small ridge around W: V = W + (E[t x^T] - W H) (H + ridge)^-1. Without the ridge,
        E|V' x - t|^2 = <(V' - V) H, V' - V> + const, so compressing V under H makes up for errors made before this layer.

        Args:
            matrix: W, [out_features, in_features], or some of its rows.
            rows: which these are.
        """
        if self._wanted is None or self.num_corrected == 0:
            return matrix
        damped = self._sum.clone()
        share = max(_RIDGE, self._sum.shape[0] / self.num_corrected)
        damped.diagonal().add_(share * self._sum.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return matrix  # no correction can be computed: none is made
        drift = (self._wanted[rows] - matrix.double() @ self._sum).T
        corrected = matrix + torch.cholesky_solve(drift, factor).T.to(matrix.dtype)
        return corrected if _is_storable(corrected) else matrix

    def refitted(self, matrix: Tensor, ridge: float, *, affine: bool = True) -> tuple[Tensor, Tensor]:
        """The weight and the bias that best give the wanted outputs: of E|V x + b - t|^2 plus a ridge around W.

        With mu = E x and C the covariance of x, V = W + (Cov(t, x) - W C)(C + ridge)^-1 and b = E t - V mu.

        Args:
            matrix: W, [out_features, in_features].
            ridge: share of the mean diagonal of C; it is no less than one over the tokens for each input.
            affine: whether there is a bias; without, means count as zero, and so b is.

        Raises:
            ValueError: no outputs were gathered.
        """
        if self._wanted is None or self._first is None or self.num_corrected == 0:
            raise ValueError("a refit takes wanted outputs")
        count = self.num_corrected
        inputs, outputs = (total / count if affine else torch.zeros_like(total) for total in self._first)
        covariance = self._sum / count - torch.outer(inputs, inputs)
        drift = self._wanted / count - torch.outer(outputs, inputs) - matrix.double() @ covariance
        share = max(ridge, self._sum.shape[0] / count)
        diagonal = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        covariance.diagonal().add_(share * diagonal)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        wide = matrix.double() if failed else matrix.double() + torch.cholesky_solve(drift.T, factor).T
        bias = outputs - wide @ inputs
        if not (_is_storable(wide) and _is_storable(bias)):
            return matrix, torch.zeros_like(bias, dtype=matrix.dtype)
        return wide.to(matrix.dtype), bias.to(matrix.dtype)


def _is_storable(values: Tensor) -> bool:
    """Whether float16, in which models are stored, holds all values; of a correction that it does not hold, none is made."""
    return bool(values.abs().amax() <= torch.finfo(torch.float16).max)


def is_usable(rows: Tensor) -> Tensor:
    """Which tokens [n, features] can be counted: finite ones, whose squares float32 can add up. NaN compares as false."""
    return torch.linalg.vector_norm(rows, dim=1) < _LARGEST


def _add_gram(total: Tensor, rows: Tensor) -> None:
    """Add x^T x to ``total`` [n, n], of which only the panels on and above the diagonal are computed."""
    for first in range(0, rows.shape[1], _GRAM_PANEL):
        last = first + _GRAM_PANEL
        panel = rows[:, first:last].T @ rows[:, first:]
        total[first:last, first:] += panel
        total[last:, first:last] += panel[:, _GRAM_PANEL:].T


def _rows(inputs: Tensor) -> Tensor:
    return inputs.detach().reshape(-1, inputs.shape[-1]).float()
