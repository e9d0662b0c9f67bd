"""Exact steps for the continuous part of additive codebooks: codewords by conjugate gradients, scales in closed form.

With the codes fixed, <dW H, dW> is a quadratic form in the codewords, and in the scale of each output group. Legend as in
:mod:`algorithms.numerics.codebooks.code_search`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import AdditiveCodes, CodewordScatter, code_rows, group, sum_codewords, ungroup
from algorithms.numerics.spread import WHOLE, Spread

_RIDGE = 1e-6
# Past this drop of the preconditioned residual (squared), float32 rounding steers the iteration, and it can diverge.
_EXHAUSTED = 1e-9


def solve_codebooks(
    weight: AdditiveCodes, error: Tensor, hessian: Tensor, *, iterations: int, spread: Spread = WHOLE
) -> tuple[Tensor, Tensor]:
    """Lower the loss over all codewords at once by preconditioned conjugate gradients, warm-started at the current ones.

    The preconditioner is the block diagonal of the normal matrix: for codeword k the ig x ig sum of s^2 H_jj over the places
    that use it. Codewords that no group uses stay as they are.

    Args:
        weight: current codes, codebooks and scales.
        error: E = (W - W_hat) H, [O, I], for these.
        hessian: H, [I, I].
        iterations: number of products with H; the loss falls with each.
        spread: over processes, of the output groups.

    Returns:
        New codebooks [M, K, og, ig] and the new E.
    """
    M, K, og, ig = weight.codebooks.shape
    rows = code_rows(weight.codes, K)
    scatter = CodewordScatter(rows, M * K)
    scales = weight.scales[:, None, None]
    shape = weight.codes.shape[:2]

    def _adjoint(matrix: Tensor) -> Tensor:
        return scatter((group(matrix, (og, ig)) * scales).flatten(0, 1))

    solution = weight.flat_codebooks
    residual, blocks = _adjoint(error), _diagonal_blocks(weight, hessian)
    spread.sum_(residual, blocks)
    precondition = _block_preconditioner(blocks, (og, ig), hessian.dtype)
    direction = preconditioned = precondition(residual)
    power = torch.sum(residual * preconditioned)
    exhausted = _EXHAUSTED * power
    for _ in range(iterations):
        moved = ungroup(sum_codewords(rows, direction).view(*shape, og * ig) * scales, (og, ig)) @ hessian
        product = _adjoint(moved)
        curvature = torch.sum(direction * product)
        # What decides whether to go on is a sum over the processes: they go on together even if they round differently.
        is_left = (power > exhausted).to(power.dtype)
        spread.sum_(product, curvature, is_left)
        if not (curvature > 0 and is_left >= spread.count):
            break
        length = power / curvature
        solution = solution + length * direction
        error = error - length * moved
        residual = residual - length * product
        preconditioned = precondition(residual)
        new_power = torch.sum(residual * preconditioned)
        direction = preconditioned + (new_power / power) * direction
        power = new_power
    return solution.view(M, K, og, ig), error


def _diagonal_blocks(weight: AdditiveCodes, hessian: Tensor) -> Tensor:
    """The normal matrix's blocks [M*K, ig, ig] float64 of single codewords, the same for each of their og rows."""
    M, K, _og, ig = weight.codebooks.shape
    no, ni, _ = weight.codes.shape
    places = code_rows(weight.codes, K).view(no, ni, M) * ni + torch.arange(ni, device=hessian.device)[None, :, None]
    energy = weight.scales.square()[:, None, None].expand(no, ni, M)
    # Summed in float64: a ridge of 1e-6 then suffices to factor even rank-deficient blocks.
    uses = torch.bincount(places.reshape(-1), weights=energy.double().reshape(-1), minlength=M * K * ni).view(M * K, ni)
    diagonal = hessian.view(ni, ig, ni, ig).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (uses.double() @ diagonal.reshape(ni, ig * ig).double()).view(M * K, ig, ig)


def _block_preconditioner(blocks: Tensor, group_shape: tuple[int, int], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    og, ig = group_shape
    ridge = blocks.diagonal(dim1=1, dim2=2).mean(1) * _RIDGE
    ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    factor = torch.linalg.cholesky(blocks + ridge[:, None, None] * torch.eye(ig, dtype=blocks.dtype, device=blocks.device))
    inverse = torch.cholesky_inverse(factor).to(dtype)

    def _precondition(residual: Tensor) -> Tensor:
        return (residual.view(-1, og, ig) @ inverse).view(-1, og * ig)

    return _precondition


def solve_scales(weight: AdditiveCodes, matrix: Tensor, smoothed: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale of every output group in closed form; a group that has none keeps its scale.

    With W_hat H = W H - E at hand, no product with H is needed: a row's best factor is <W_hat H, W> / <W_hat H, W_hat>.

    Args:
        weight: current codes, codebooks and scales.
        matrix: W, [O, I].
        smoothed: W H, [O, I].
        error: E = (W - W_hat) H, [O, I].

    Returns:
        Scales [no], positive, and the new E.
    """
    og = weight.group_shape[0]
    estimate = smoothed - error
    numerator = torch.sum(estimate * matrix, dim=1).view(-1, og).sum(1)
    denominator = torch.sum(estimate * weight.dequantize(), dim=1).view(-1, og).sum(1)
    factor = numerator / denominator
    factor = torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))
    return weight.scales * factor, smoothed - estimate * factor.repeat_interleave(og)[:, None]
