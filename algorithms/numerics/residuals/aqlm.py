"""Additive codebooks as a coder of residuals (AQLM, arXiv 2401.06118)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.numerics.codebooks.additive_fit import AdditiveSettings, fit_additive
from algorithms.numerics.residuals.coder import CodedResidual, stored_bits
from algorithms.numerics.residuals.vector_codes import packed_codes, unpacked_codes

_MOST_BITS = 8  # of a codebook; longer codes are sums of several
_ROUNDS = 12
_POINTS_PER_CODEWORD = 256


@dataclass(frozen=True, kw_only=True)
class AdditiveResidual:
    """Additive codes of the matrix with zero columns after its last, so that groups divide it; ``columns`` is I."""

    weight: AdditiveCodes
    columns: int

    def movable(self) -> dict[str, Tensor]:
        """Codebooks and scales."""
        return {"codebooks": self.weight.codebooks, "scales": self.weight.scales}

    def decode(self, values: Mapping[str, Tensor]) -> Tensor:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        return self.weight.replace(**values).dequantize()[:, : self.columns]

    def moved(self, values: Mapping[str, Tensor]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        stored = {name: value.detach().half().float() for name, value in values.items()}
        return type(self)(weight=self.weight.replace(**stored), columns=self.columns)

    def dequantize(self) -> Tensor:
        """The matrix [O, I] float32."""
        return self.decode(self.movable())

    def bits(self) -> Mapping[str, int]:
        """Codes, codebooks and scales."""
        sizes = {name: stored_bits(tensor) for name, tensor in self.tensors().items()}
        return {"codes": sizes["codes"], "codebooks": sizes["codebooks"], "scales": sizes["scales"]}

    def tensors(self) -> dict[str, Tensor]:
        """``codes`` as one bit stream, codebooks [M, K, 1, g] and scales [O] in float16."""
        bits = self.weight.codebooks.shape[1].bit_length() - 1
        books, scales = self.weight.codebooks.half(), self.weight.scales.half()
        return {**packed_codes(self.weight.codes, bits), "codebooks": books, "scales": scales}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        books, (rows, columns) = tensors["codebooks"].float(), shape
        places = (rows, -(-columns // books.shape[3]), books.shape[0])
        codes = unpacked_codes(tensors, books.shape[1].bit_length() - 1, places)
        weight = AdditiveCodes(codes=codes, codebooks=books, scales=tensors["scales"].float())
        return cls(weight=weight, columns=columns)


def num_codebooks(code_bits: int) -> int:
    """The fewest codebooks of at most eight bits that share the bits of a code evenly."""
    return next(count for count in range(-(-code_bits // _MOST_BITS), code_bits + 1) if code_bits % count == 0)


class AdditiveCoder:
    """See :class:`algorithms.numerics.residuals.coder.ResidualCoder`.

    Args:
        code_bits: for a group of columns; more than 8 are shared out evenly among as few codebooks as divide them.
        group_size: columns a group.
    """

    def __init__(self, code_bits: int, group_size: int) -> None:
        books = num_codebooks(code_bits)
        codewords = 1 << (code_bits // books)
        self._settings = AdditiveSettings(
            num_codebooks=books,
            num_codewords=codewords,
            group_shape=(1, group_size),
            max_rounds=_ROUNDS,
            max_points=_POINTS_PER_CODEWORD * codewords,
        )

    def encode(
        self,
        residual: Tensor,
        hessian: Tensor | None,
        generator: torch.Generator,
        previous: CodedResidual | None = None,
    ) -> AdditiveResidual:
        """Code one residual, from k-means on: earlier codings are ignored."""
        columns, group_size = residual.shape[1], self._settings.group_shape[1]
        padding = -columns % group_size
        wide = torch.eye(columns, device=residual.device) if hessian is None else hessian
        fit = fit_additive(
            F.pad(residual, (0, padding)), F.pad(wide, (0, padding, 0, padding)), self._settings, generator
        ).weight
        stored = {name: getattr(fit, name).half().float() for name in ("codebooks", "scales")}
        return AdditiveResidual(weight=fit.replace(**stored), columns=columns)
