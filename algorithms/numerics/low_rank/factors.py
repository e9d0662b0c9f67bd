"""The low-rank part of a weight: the best one under a Hessian, and how its factors are stored.

Legend: O out_features, I in_features, r rank. With H = C C^T, |D C|_F^2 = <D H, D>: the rank-r matrix nearest to R under H
is the truncated singular value decomposition of R C, times C^-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.numerics.bit_packing import WORD, pack_bits, packed_words, unpack_bits
from algorithms.numerics.residuals.coder import stored_bits

HALF = 16
_OVERSAMPLING = 10
_POWER_ITERATIONS = 2
# With a sketch of more than this share of all directions, the exact decomposition costs no more.
_EXACT_SHARE = 0.25
_SMALLEST_SCALE = 2.0**-24  # float16's smallest number above zero


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """``up`` [O, r] and ``down`` [r, I] float32, as storage holds them: in float16, or in fewer ``bits``.

    In fewer bits each column of ``up`` is a code over the largest code, and each row of ``down`` a code times one of ``scales``
    [r]: the scale of a product stands in one place.
    """

    up: Tensor
    down: Tensor
    bits: int
    scales: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.up.shape[1]

    def dequantize(self) -> Tensor:
        """The product [O, I]."""
        return self.up @ self.down

    def tensors(self) -> dict[str, Tensor]:
        """What is stored."""
        if self.scales is None:
            return {"up": self.up.half(), "down": self.down.half()} if self.rank else {}
        top = _top(self.bits)
        up, down = (self.up * top).round(), (self.down / self.scales[:, None]).round()
        up_codes, down_codes = (pack_bits((codes + top).to(torch.uint8).flatten(), self.bits) for codes in (up, down))
        return {"up": up_codes, "down": down_codes, "low_rank_scales": self.scales.half()}

    def bits_by_component(self) -> Mapping[str, int]:
        """Bits of all that is stored."""
        return {"low_rank": sum(stored_bits(tensor) for tensor in self.tensors().values())}

    @staticmethod
    def stored_size(shape: tuple[int, int], rank: int, bits: int) -> int:
        """Bits that factors of this rank take, of a matrix of ``shape`` (O, I)."""
        if bits == HALF:
            return HALF * rank * sum(shape)
        return sum(WORD * packed_words(rank * side, bits) for side in shape) + HALF * rank

    @classmethod
    def restore(
        cls, tensors: Mapping[str, Tensor], shape: tuple[int, int], bits: int, device: torch.device | str = "cpu"
    ) -> LowRank:
        """The inverse of :meth:`tensors`, for a matrix of ``shape`` (O, I); without any tensors, on a ``device``."""
        rows, columns = shape
        if "up" not in tensors:
            return cls.zero(shape, bits, device)
        if bits == HALF:
            return cls(up=tensors["up"].float(), down=tensors["down"].float(), bits=bits)
        scales, top = tensors["low_rank_scales"].float(), _top(bits)
        rank = scales.shape[0]
        up = unpack_bits(tensors["up"], bits, rows * rank).view(rows, rank).float() - top
        down = unpack_bits(tensors["down"], bits, rank * columns).view(rank, columns).float() - top
        return cls(up=up / top, down=down * scales[:, None], bits=bits, scales=scales)

    @classmethod
    def zero(cls, shape: tuple[int, int], bits: int, device: torch.device | str = "cpu") -> LowRank:
        """No low-rank part."""
        return cls(up=torch.zeros(shape[0], 0, device=device), down=torch.zeros(0, shape[1], device=device), bits=bits)

    @classmethod
    def stored(cls, up: Tensor, down: Tensor, bits: int) -> LowRank:
        """Factors [O, r] and [r, I] rounded to what storage holds.

        Args:
            up: L1.
            down: L2.
            bits: 2 to 8, or 16 for float16.
        """
        up, down = up.detach().float(), down.detach().float()
        if up.shape[1] == 0:
            return cls(up=up, down=down, bits=bits)
        sizes = up.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
        if bits == HALF:
            # Both factors of a product are of about one size, well inside float16's range.
            balance = torch.sqrt(down.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / sizes)
            return cls(up=(up * balance).half().float(), down=(down / balance[:, None]).half().float(), bits=bits)
        top = _top(bits)
        up, down = up / sizes, down * sizes[:, None]
        scales = (down.abs().amax(1) / top).half().float().clamp(min=_SMALLEST_SCALE)
        codes = (down / scales[:, None]).round().clamp(-top, top)
        return cls(up=(up * top).round() / top, down=codes * scales[:, None], bits=bits, scales=scales)


class Geometry:
    """Errors as the input weighs them: |D|_H^2 = <D H, D>.

    Args:
        hessian: H [I, I]; None for the identity.
        damping: share of the mean diagonal that is added, so that H can be inverted.
    """

    def __init__(self, hessian: Tensor | None, damping: float = 0.01) -> None:
        self._root: Tensor | None = None
        if hessian is None:
            return
        damped = hessian.to(torch.float64, copy=True)
        mean = damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        for step in range(4):
            damped.diagonal().add_(damping * 10.0**step * mean)
            root, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                self._root = root
                return
        self._root = damped.diagonal().clamp(min=0).add(mean).sqrt().diag()

    def error(self, difference: Tensor) -> float:
        """|D|_H^2 of D [O, I]."""
        wide = difference.double()
        return float((wide if self._root is None else wide @ self._root).square().sum())

    def best(self, matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors [O, r] and [r, I] float32 of the matrix of rank r nearest to one [O, I]; r is at most its full rank."""
        wide = matrix.double()
        left, values, right = truncated_svd(wide if self._root is None else wide @ self._root, rank, generator)
        if self._root is not None:
            right = torch.linalg.solve_triangular(self._root, right, upper=False, left=False)
        roots = values.sqrt()
        return (left * roots).float(), (roots[:, None] * right).float()


def truncated_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``rank`` singular values [r] with their vectors [O, r] and [r, I].

    Randomised (arXiv 0909.4061): a sketch of ten directions more than are asked for, sharpened by two power iterations; exact
    where that would be no less work.
    """
    most = min(matrix.shape)
    rank = min(rank, most)
    width = rank + _OVERSAMPLING
    if width > _EXACT_SHARE * most:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix)
        basis = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    return left[:, :rank], values[:rank], right[:rank]


def _top(bits: int) -> int:
    """The largest code, and minus the smallest."""
    return (1 << (bits - 1)) - 1
