"""THE column sweep: quantize a matrix column by column and let later columns make up for the errors of earlier ones.

GPTQ (arXiv 2210.17323), after optimal brain compression. Legend: O out_features, I in_features. Matrices stand columns first,
[I, O]: a column of the weight is a row of memory, and everything that a step touches is contiguous.

With H^-1 = U^T U, U upper triangular, quantizing column j with error e = (w_j - w_hat_j) / U_jj changes every later column k by
-e * U_jk; that is the exact minimiser of <dW H, dW> over the columns that are still free. 1 / U_jj^2 is what a squared error in
column j then costs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Columns between two updates of everything behind them: the update is then a product of depth 128, not a sum of outer products.
LAZY_COLUMNS = 128
_DAMPING_STEPS = 6


class ColumnQuantizer(Protocol):
    """Quantizes one column at a time, and keeps what it chose.

    ``group_size`` columns share what ``begin_group`` fits; a group never begins before the errors of all earlier columns have
    reached its columns.
    """

    @property
    def group_size(self) -> int:
        """Columns a group."""
        ...

    def begin_group(self, start: int, columns: Tensor, pivots: Tensor) -> None:
        """Fit the group that begins at place ``start`` to its columns [g, O] as they are now; ``pivots`` [g] are their U_jj."""
        ...

    def quantize(self, place: int, column: Tensor, pivot: Tensor) -> Tensor:
        """The column [O] as it will be stored; ``pivot`` is its U_jj."""
        ...

    def requantize(self, place: int, column: Tensor) -> Tensor:
        """Another value [O] for a column whose group is fitted, as it will be stored."""
        ...


@dataclass(frozen=True, kw_only=True)
class Factor:
    """``upper`` [I, I] float32 is U; ``hessian`` [I, I] float32 the damped H it belongs to; ``damping`` what it took."""

    upper: Tensor
    hessian: Tensor
    damping: float

    @property
    def pivots(self) -> Tensor:
        """U_jj, [I]."""
        return self.upper.diagonal().contiguous()


def inverse_factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Factor:
    """U of H + damping * mean(diag H) * I, its rows and columns in ``order``.

    U is the inverse of the upper-triangular M with H = M M^T, which is a Cholesky factor read backwards: one factorisation and
    one triangular inverse, in float64. Where it fails, the damping grows tenfold, six times at the most; then the diagonal
    alone counts. A column that no token reaches (H_jj = 0) is rounded to nearest and compensates nothing.

    Args:
        hessian: H [I, I], positive semi-definite up to rounding.
        damping: share of the mean diagonal, at least 0.
        order: places to model columns, [I] int64.
    """
    wide = hessian.double() if order is None else hessian.double()[order][:, order]
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for step in range(_DAMPING_STEPS + 1):
        tried = damping if step == 0 else max(damping, 1e-4) * 10.0**step
        damped = wide.clone()
        damped.diagonal().add_(tried * mean)
        damped.diagonal()[damped.diagonal() <= 0] = mean
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and torch.isfinite(lower.diagonal()).all():
            damped = damped.float()  # three float64 matrices of I^2 are alive at once from here on, no more
            identity = torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if step:
                logger.warning(
                    "a Hessian needed damping %.2g, not %.2g, to be factored; its linears lose some accuracy", tried, damping
                )
            return Factor(upper=upper.float().contiguous(), hessian=damped, damping=tried)
    logger.warning("a Hessian could not be factored at any damping; its diagonal alone is used")
    diagonal = wide.diagonal().clamp(min=0) + mean
    return Factor(upper=diagonal.rsqrt().diag().float(), hessian=diagonal.diag().float(), damping=math.inf)


def column_costs(hessian: Tensor, damping: float) -> Tensor:
    """What a squared error in each column costs once all later ones make up for it: 1 / U_jj^2, [I] float32.

    The squared diagonal of the Cholesky factor that :func:`inverse_factor` inverts, in float32: an estimate, for choices that
    come before a sweep. Where H cannot be factored, its diagonal, which is the cost when nothing makes up for anything.

    Args:
        hessian: H [I, I], columns in the order of the sweep.
        damping: share of the mean diagonal.
    """
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    costs = lower.diagonal().flip(0).square()
    return hessian.diagonal().clone() if failed or not torch.isfinite(costs).all() else costs


def sweep(columns: Tensor, factor: Factor | None, quantizer: ColumnQuantizer) -> Tensor:
    """Quantize every column once, from the first to the last.

    Args:
        columns: W transposed, [I, O] float32; left as it is.
        factor: of the input Hessian in the same order; None rounds every column on its own.
        quantizer: gets and keeps the columns.

    Returns:
        The quantized columns, [I, O].
    """
    work, result = columns.clone(), torch.empty_like(columns)
    pivots = torch.ones_like(columns[:, 0]) if factor is None else factor.pivots
    errors = columns.new_empty(LAZY_COLUMNS, columns.shape[1])
    for first, last in _panels(columns.shape[0], quantizer.group_size):
        for place in range(first, last):
            if place % quantizer.group_size == 0:
                stop = place + quantizer.group_size
                quantizer.begin_group(place, work[place:stop], pivots[place:stop])
            result[place] = quantizer.quantize(place, work[place], pivots[place])
            if factor is None:
                continue
            error = torch.sub(work[place], result[place], out=errors[place - first]).div_(pivots[place])
            work[place + 1 : last].addr_(factor.upper[place, place + 1 : last], error, alpha=-1)
        if factor is not None and last < columns.shape[0]:
            work[last:].addmm_(factor.upper[first:last, last:].T, errors[: last - first], alpha=-1)
    return result


def refine(columns: Tensor, result: Tensor, hessian: Tensor, quantizer: ColumnQuantizer) -> Tensor:
    """One pass of coordinate descent over a finished sweep: each column takes its best value given all the others.

    <dW H, dW> never rises where ``requantize`` gives the nearest value that can be stored.

    Args:
        columns: W transposed, [I, O].
        result: what the sweep made of it, [I, O]; changed in place and returned.
        hessian: H [I, I] float32, in the order of the columns.
        quantizer: the one that made ``result``.
    """
    gradient = hessian @ (columns - result)
    diagonal = hessian.diagonal().contiguous()
    changes = columns.new_empty(LAZY_COLUMNS, columns.shape[1])
    for first, last in _panels(columns.shape[0], LAZY_COLUMNS):
        for place in range(first, last):
            best = torch.addcdiv(result[place], gradient[place], diagonal[place])
            change = torch.sub(quantizer.requantize(place, best), result[place], out=changes[place - first])
            result[place] += change
            gradient[place + 1 : last].addr_(hessian[place, place + 1 : last], change, alpha=-1)
        if last < columns.shape[0]:
            gradient[last:].addmm_(hessian[first:last, last:].T, changes[: last - first], alpha=-1)
    return result


def quadratic_loss(columns: Tensor, result: Tensor, hessian: Tensor) -> float:
    """<dW H, dW> for dW = columns - result, both [I, O]: the squared output error a token, summed over outputs."""
    difference = columns - result
    return torch.sum((hessian @ difference).double() * difference).item()


def _panels(num_columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most ``LAZY_COLUMNS`` places, none of which ends inside a group that began in it unless the group is longer.

    A longer group begins with a run, so that its columns are up to date when it is fitted.
    """
    step = LAZY_COLUMNS // group_size * group_size
    bounds = range(0, num_columns, group_size if step == 0 else step)
    for start in bounds:
        stop = min(start + (bounds.step), num_columns)
        for first in range(start, stop, LAZY_COLUMNS):
            yield first, min(first + LAZY_COLUMNS, stop)
