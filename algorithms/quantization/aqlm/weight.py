"""A linear layer whose weight is additive codebooks, as it is tuned; and what it costs in bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.finetuning.tunable import TunableLinear
from algorithms.numerics.codebooks.additive import AdditiveCodes, CodewordScatter, code_rows, sum_codewords, ungroup

_STORED_BITS = 16


class AqlmLinear(TunableLinear):
    """Fixed codes, trainable codebooks [M*K, og*ig] and scales [no]."""

    def __init__(self, weight: AdditiveCodes, bias: Tensor | None) -> None:
        super().__init__(bias)
        self._fitted = weight
        self.codebooks = nn.Parameter(weight.flat_codebooks.clone())
        self.scales = nn.Parameter(weight.scales.clone())
        self._rows = code_rows(weight.codes, weight.codebooks.shape[1])
        self._scatter = CodewordScatter(self._rows, self.codebooks.shape[0])

    def decode(self) -> Tensor:
        """The weight [out_features, in_features]."""
        no, ni, _ = self._fitted.codes.shape
        sums: Tensor = _SumCodewords.apply(self.codebooks, self._rows, self._scatter)
        return ungroup(sums.view(no, ni, -1) * self.scales[:, None, None], self._fitted.group_shape)

    def current(self) -> AdditiveCodes:
        """The codes with the present values of codebooks and scales."""
        codebooks = self.codebooks.detach().view_as(self._fitted.codebooks)
        return self._fitted.replace(codebooks=codebooks, scales=self.scales.detach())


class _SumCodewords(torch.autograd.Function):
    """sum_codewords with its adjoint as the gradient: segment sums over codes that were sorted once."""

    @staticmethod
    def forward(ctx: Any, codebooks: Tensor, rows: Tensor, scatter: CodewordScatter) -> Tensor:  # noqa: ANN401 - torch's own
        """Codebooks [M*K, d] and rows [G, M] to [G, d]."""
        ctx.scatter = scatter
        return sum_codewords(rows, codebooks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """Gradient [G, d] to [M*K, d]."""
        return ctx.scatter(gradient.contiguous()), None, None


def stored_bits(codes_shape: tuple[int, ...], codebooks_shape: tuple[int, ...]) -> Mapping[str, int]:
    """Bits of one stored linear by component, from codes [no, ni, M] and codebooks [M, K, og, ig] (spec: AQLM average bits)."""
    no, ni, num_codebooks = codes_shape
    bits = codebooks_shape[1].bit_length() - 1
    return {
        "codes": no * ni * num_codebooks * bits,
        "codebooks": torch.Size(codebooks_shape).numel() * _STORED_BITS,
        "scales": no * _STORED_BITS,
    }
