"""A residual as codewords of vectors of neighbouring rows, at scales of tiles: how it is stored.

Legend: O out_features, I in_features; a vector is b neighbouring rows of one column; n = ceil(O/b) vectors a column, the last
of which may reach beyond O; K codewords; T tiles a row of vectors, of about as many columns each.

    R_hat[vector v of column j] = scales[v, tile(j)] * book[codes[v, j]]

Tiles are runs of neighbouring columns, in an order that every block of about 64 rows may have for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.residuals.coder import stored_bits
from algorithms.numerics.sparse_quantized import Statistics
from algorithms.numerics.two_level import quantize_statistics

BLOCK_ROWS = 64  # that have an order of columns in common
_SCALE_BITS = 8
_RUN = 256  # scales that share a second level
_BYTE, _HALF = 8, 16


@dataclass(frozen=True, kw_only=True)
class VectorCodes:
    """Codes [n, I] int64, ``book`` [K, b] with float16 values, two-level ``scales`` of [n * T, 1]; ``rows`` is O.

    ``order`` is [blocks, I], or None for the model's.
    """

    codes: Tensor
    book: Tensor
    scales: Statistics
    rows: int
    order: Tensor | None = None

    @property
    def tiles(self) -> int:
        """T."""
        assert self.scales.codes is not None
        return self.scales.codes.shape[0] // self.codes.shape[0]

    def movable(self) -> dict[str, Tensor]:
        """The codebook and the scales [n, T]."""
        return {"book": self.book, "scales": self.scales.decode().view(-1, self.tiles)}

    def decode(self, values: Mapping[str, Tensor]) -> Tensor:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        return assembled(values["book"], self.codes, spread_scales(values["scales"], self.codes.shape, self.order), self.rows)

    def moved(self, values: Mapping[str, Tensor]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        return replace(self, book=values["book"].half().float(), scales=two_level(values["scales"]))

    def dequantize(self) -> Tensor:
        """The matrix [O, I] float32."""
        return self.decode(self.movable())

    def bits(self) -> Mapping[str, int]:
        """Codes, scales with their second level, codebook, and orders where there are any."""
        sizes = {name: stored_bits(tensor) for name, tensor in self.tensors().items()}
        groups = {"codes": ("codes", "high_codes"), "codebooks": ("book",), "permutation": ("order",)}
        groups["scales"] = ("scale_codes", "run_scales", "run_zeros")
        return {group: sum(sizes.get(name, 0) for name in names) for group, names in groups.items()}

    def tensors(self) -> dict[str, Tensor]:
        """``codes`` as a bit stream, the part above 8 bits as ``high_codes``; scales, codebook and order."""
        tensors = {**packed_codes(self.codes, self.book.shape[0].bit_length() - 1), **packed_scales(self.scales)}
        tensors["book"] = self.book.half()
        if self.order is not None:
            tensors["order"] = self.order.to(torch.int32).to(torch.int16)
        return tensors

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        book, order = tensors["book"].float(), tensors.get("order")
        vectors = (-(-shape[0] // book.shape[1]), shape[1])
        return cls(
            codes=unpacked_codes(tensors, book.shape[0].bit_length() - 1, vectors),
            book=book,
            scales=unpacked_scales(tensors),
            rows=shape[0],
            order=None if order is None else order.to(torch.int64) & 0xFFFF,
        )


def assembled(book: Tensor, codes: Tensor, scales: Tensor, rows: int) -> Tensor:
    """The matrix [rows, I] of codewords [K, b] by codes [n, I] at scales [n, I]."""
    vectors = torch.nn.functional.embedding(codes, book) * scales[..., None]
    return vectors.transpose(1, 2).reshape(-1, codes.shape[1])[:rows]


def spread_scales(scales: Tensor, shape: torch.Size, order: Tensor | None) -> Tensor:
    """The scale of every vector, [n, I], from those of tiles, [n, T]."""
    vectors, columns = shape
    tile = tile_of(columns, scales.shape[1], scales.device)
    if order is None:
        return scales[:, tile]
    in_block = torch.empty_like(order).scatter_(1, order, tile.expand_as(order))
    rows_a_block = -(-vectors // order.shape[0])
    return scales.gather(1, in_block.repeat_interleave(rows_a_block, 0)[:vectors])


def tile_of(columns: int, tiles: int, device: torch.device) -> Tensor:
    """The tile of every place, [I]: all of the same width but the last."""
    return torch.arange(columns, device=device) // -(-columns // tiles)


def two_level(scales: Tensor) -> Statistics:
    """Scales [n, T] in 8 bits each, with float16 second levels for runs of 256."""
    return quantize_statistics(scales.detach().flatten(), bits=_SCALE_BITS, run=_RUN)


def packed_codes(codes: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes of up to 16 bits as one stream of their low eight bits and one of the others."""
    flat = codes.flatten()
    low = {"codes": pack_bits((flat & 0xFF).to(torch.uint8), min(bits, _BYTE))}
    return low if bits <= _BYTE else {**low, "high_codes": pack_bits((flat >> _BYTE).to(torch.uint8), bits - _BYTE)}


def unpacked_codes(tensors: Mapping[str, Tensor], bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`packed_codes`, int64."""
    count = torch.Size(shape).numel()
    codes = unpack_bits(tensors["codes"], min(bits, _BYTE), count).long()
    if bits > _BYTE:
        codes |= unpack_bits(tensors["high_codes"], bits - _BYTE, count).long() << _BYTE
    return codes.view(shape)


def packed_scales(scales: Statistics) -> dict[str, Tensor]:
    """Codes in a byte each, and the second level in float16."""
    assert scales.codes is not None
    assert scales.run_scales is not None
    assert scales.run_zeros is not None
    codes = scales.codes.flatten()
    return {"scale_codes": codes, "run_scales": scales.run_scales.half(), "run_zeros": scales.run_zeros.half()}


def unpacked_scales(tensors: Mapping[str, Tensor]) -> Statistics:
    """The inverse of :func:`packed_scales`."""
    return Statistics(
        codes=tensors["scale_codes"][:, None],
        run_scales=tensors["run_scales"].float(),
        run_zeros=tensors["run_zeros"].float(),
        bits=_SCALE_BITS,
        run=_RUN,
    )


def scales_size(count: int) -> int:
    """Bits that :func:`packed_scales` of so many scales takes."""
    return _SCALE_BITS * count + 2 * _HALF * -(-count // _RUN)
