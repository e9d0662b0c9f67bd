"""A linear layer of additive codes whose dense weight is what the loss is differentiated by.

Codes, codebooks and scales are parameters that autograd does not see; the weight is decoded from them, and its gradient is
handed to the step, which turns it into gradients of the codebooks and scales and into targets for the codes. With several
ranks all three are sharded along the output groups, the weight exists only while a layer computes, and of its gradient a rank
keeps the rows whose codes it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from algorithms.numerics.codebooks.additive import AdditiveCodes, code_rows, sum_codewords, ungroup
from algorithms.parallel.ranks import Ranks


class CodedLinear(nn.Module):
    """Stands in for ``nn.Linear``.

    Legend: O out_features, I in_features, no and ni output and input groups, M codebooks of K codewords of d weights.

    Args:
        weight: codes, codebooks and scales to start from; K is a power of two.
        bias: [O] or None.
        container: signed integer dtype that the codes are kept in, two's complement.
        master: dtype of codebooks, scales and bias.
        compute: dtype of the matrix products.
        ranks: those that hold the other rows.
    """

    def __init__(
        self,
        weight: AdditiveCodes,
        bias: Tensor | None,
        *,
        container: torch.dtype,
        master: torch.dtype,
        compute: torch.dtype,
        ranks: Ranks,
    ) -> None:
        super().__init__()
        self.num_output_groups, self.num_input_groups, self.num_codebooks = weight.codes.shape
        self.num_codewords, self.group_shape = weight.codebooks.shape[1], weight.group_shape
        self.out_features = self.num_output_groups * self.group_shape[0]
        self.in_features = self.num_input_groups * self.group_shape[1]
        self.codes = nn.Parameter(weight.codes.to(container), requires_grad=False)
        self.codebooks = nn.Parameter(weight.flat_codebooks.to(master), requires_grad=False)
        self.scales = nn.Parameter(weight.scales.to(master), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(master))
        self.gradient: Tensor | None = None  # of this rank's rows, float32
        self.sums_gradient = True  # over ranks, at once; else at the last micro-batch
        self._compute, self._ranks = compute, ranks
        self._unsummed: Tensor | None = None
        self._dense: Tensor | None = None
        # Lets autograd come here even where nothing before this layer is trained.
        self._anchor = torch.zeros((), device=weight.codes.device, requires_grad=True)

    @property
    def rows_per_rank(self) -> int:
        """Output groups of every rank but the last ones, as parameters are sharded along their first dimension."""
        return -(-self.num_output_groups // self._ranks.size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., I] to [..., O], in the compute dtype."""
        outputs: Tensor = _Product.apply(inputs.to(self._compute), self._anchor, self)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def dense(self) -> Tensor:
        """The weight [O, I] in the compute dtype: the kept one, or decoded from parameters that are whole at the moment."""
        if self._dense is not None:
            return self._dense
        return self.decode(self.codes, self.codebooks, self.scales)

    def decode(self, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
        """Rows of the weight, [rows*og, I] in the compute dtype, from their codes and scales."""
        return self.decode_exactly(codes, codebooks, scales).to(self._compute)

    def decode_exactly(self, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
        """Rows of the weight, [rows*og, I] in the dtype of codebooks and scales."""
        sums = sum_codewords(self.rows_of(codes), codebooks).view(codes.shape[0], self.num_input_groups, -1)
        return ungroup(sums * scales[:, None, None], self.group_shape)

    def rows_of(self, codes: Tensor) -> Tensor:
        """Codes [rows, ni, M] in their container as row numbers into the codebooks, [rows*ni, M] int64."""
        return code_rows(self.unsigned(codes), self.num_codewords)

    def unsigned(self, codes: Tensor) -> Tensor:
        """Codes as numbers 0 .. K-1, int64."""
        return codes.long().bitwise_and_(self.num_codewords - 1)

    def keep_dense(self) -> None:
        """Decode once, until the parameters change again; only where they are not sharded."""
        self._dense = None
        self._dense = self.dense()

    def add_gradient(self, outer: Tensor, inputs: Tensor) -> None:
        """Add the weight's gradient of one pass: outer [n, O] and inputs [n, I]."""
        if self._ranks.size == 1:
            self.gradient = _accumulated(self.gradient, outer, inputs)
            return
        self._unsummed = _accumulated(self._unsummed, outer, inputs)
        if self.sums_gradient:
            rows = self._ranks.scatter_sum(self._unsummed, self.rows_per_rank * self.group_shape[0])
            self.gradient = rows if self.gradient is None else self.gradient.add_(rows)
            self._unsummed = None


def _accumulated(total: Tensor | None, outer: Tensor, inputs: Tensor) -> Tensor:
    if total is None:
        return (outer.T @ inputs).float()
    if outer.dtype == torch.float32:
        return total.addmm_(outer.T, inputs)
    return total.add_(outer.T @ inputs)


class _Product(torch.autograd.Function):
    """inputs @ weight^T, whose weight is a layer's own business."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, anchor: Tensor, layer: CodedLinear) -> Tensor:  # noqa: ANN401 - torch's own
        """Inputs [..., I] to [..., O]."""
        ctx.save_for_backward(inputs)
        ctx.layer = layer
        return inputs @ layer.dense().T

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        """The gradient of the inputs; the weight's goes to the layer."""
        (inputs,) = ctx.saved_tensors
        ctx.layer.add_gradient(outer.flatten(0, -2), inputs.flatten(0, -2))
        return (outer @ ctx.layer.dense() if ctx.needs_input_grad[0] else None), None, None
