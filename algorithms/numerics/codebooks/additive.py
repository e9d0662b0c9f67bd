"""Additive codebooks: a weight matrix as scaled sums of codewords (AQLM, arXiv 2401.06118, section 3).

Legend: O out_features, I in_features; a group is an og x ig tile; no = O/og, ni = I/ig; M codebooks of K codewords each.

    W_hat[tile a, b] = scales[a] * sum_m codebooks[m, codes[a, b, m]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdditiveCodes:
    """Codes [no, ni, M] int64, codebooks [M, K, og, ig] and scales [no] of one matrix, all on one device."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @property
    def group_shape(self) -> tuple[int, int]:
        """(og, ig), the tile that one codeword covers."""
        return self.codebooks.shape[2], self.codebooks.shape[3]

    @property
    def flat_codebooks(self) -> Tensor:
        """All codewords as rows, [M*K, og*ig]."""
        return self.codebooks.flatten(2).flatten(0, 1)

    def dequantize(self) -> Tensor:
        """The matrix [O, I] in the codebooks' dtype."""
        return ungroup(self.unscaled() * self.scales[:, None, None], self.group_shape)

    def unscaled(self) -> Tensor:
        """Sums of codewords before scaling, [no, ni, og*ig]."""
        no, ni, _ = self.codes.shape
        return sum_codewords(code_rows(self.codes, self.codebooks.shape[1]), self.flat_codebooks).view(no, ni, -1)

    def replace(self, **changes: Tensor) -> AdditiveCodes:
        """A copy with some of its tensors exchanged."""
        return replace(self, **changes)

    @classmethod
    def joined(cls, parts: Sequence[AdditiveCodes]) -> AdditiveCodes:
        """The matrix whose rows are those of the parts, one after another; they have the same codebooks."""
        if len(parts) == 1:
            return parts[0]
        names = ("codes", "scales")
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def group(matrix: Tensor, group_shape: tuple[int, int]) -> Tensor:
    """Cut [O, I] into tiles: [no, ni, og*ig]."""
    og, ig = group_shape
    O, I = matrix.shape
    return matrix.view(O // og, og, I // ig, ig).transpose(1, 2).reshape(O // og, I // ig, og * ig)


def ungroup(tiles: Tensor, group_shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`group`: [no, ni, og*ig] to [O, I]."""
    og, ig = group_shape
    no, ni, _ = tiles.shape
    return tiles.view(no, ni, og, ig).transpose(1, 2).reshape(no * og, ni * ig)


def code_rows(codes: Tensor, num_codewords: int) -> Tensor:
    """Codes [no, ni, M] as row numbers into the flat codebooks, [no*ni, M]."""
    offsets = torch.arange(codes.shape[-1], device=codes.device) * num_codewords
    return (codes + offsets).flatten(0, 1)


def sum_codewords(rows: Tensor, flat_codebooks: Tensor) -> Tensor:
    """Sum of M codewords per group: rows [G, M] into flat_codebooks [M*K, d] gives [G, d]."""
    return F.embedding_bag(rows, flat_codebooks, mode="sum")


class CodewordScatter:
    """The adjoint of :func:`sum_codewords`: adds up group vectors by the codeword that each group uses.

    Sorting the codes once turns the scatter into segment sums, an order of magnitude faster than ``index_add_`` on a CPU and
    independent of thread scheduling.
    """

    def __init__(self, rows: Tensor, num_rows: int) -> None:
        flat = rows.reshape(-1)
        counts = torch.bincount(flat, minlength=num_rows)
        self._groups = torch.argsort(flat, stable=True) // rows.shape[1]
        self._starts = counts.cumsum(0) - counts

    def __call__(self, vectors: Tensor) -> Tensor:
        """Group vectors [G, d] to sums per codeword [M*K, d]."""
        return F.embedding_bag(self._groups, vectors, self._starts, mode="sum")


def quadratic_error(difference: Tensor, hessian: Tensor) -> float:
    """<dW H, dW>: the squared output error per token, summed over output features, accumulated in float64."""
    return torch.sum((difference @ hessian).double() * difference.double()).item()
