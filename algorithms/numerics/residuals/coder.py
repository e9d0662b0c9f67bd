"""What a coder of residuals is: a matrix that a low-rank part leaves over, as few bits, and back.

Legend: O out_features, I in_features. A coder may have sizes of its own that do not divide O or I: it pads, and never drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import torch
from torch import Tensor


class CodedResidual(Protocol):
    """A residual [O, I] as it is stored. All values are what storage holds: reading it back changes nothing.

    Some float tensors of the coding may be moved by tuning, codebooks and scales for instance: ``movable`` hands them out,
    ``decode`` is the matrix that others in their place would give, and ``moved`` the coding that stores them. A coding without
    such tensors hands out none.
    """

    def movable(self) -> dict[str, Tensor]:
        """The float32 tensors that tuning may move, by name; without gradients."""
        ...

    def decode(self, values: Mapping[str, Tensor]) -> Tensor:
        """The matrix [O, I] float32 with ``values`` in the place of :meth:`movable`, differentiable in them."""
        ...

    def moved(self, values: Mapping[str, Tensor]) -> Self:
        """The same codes with ``values``, rounded to what storage holds, in the place of :meth:`movable`."""
        ...

    def dequantize(self) -> Tensor:
        """The matrix [O, I] float32."""
        ...

    def bits(self) -> Mapping[str, int]:
        """Stored bits by component; together they are all bits of :meth:`tensors`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by names without dots."""
        ...

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """The inverse of :meth:`tensors`, for a matrix of ``shape`` (O, I)."""
        ...


class ResidualCoder(Protocol):
    """Turns residuals into codes."""

    def encode(
        self,
        residual: Tensor,
        hessian: Tensor | None,
        generator: torch.Generator,
        previous: CodedResidual | None = None,
    ) -> CodedResidual:
        """Code one residual.

        Args:
            residual: R [O, I] float32.
            hessian: H [I, I] float32 of the input; an error dR is then measured by <dR H, dR>. None: by its squares.
            generator: decides all that is random.
            previous: what the same coder made of an earlier residual of the same matrix, to begin from; it may be ignored.
        """
        ...


def stored_bits(tensor: Tensor) -> int:
    """Bits that a tensor takes in a file."""
    return 8 * tensor.numel() * tensor.element_size()
