"""Codes of a few bits as a dense little-endian bit stream in 32-bit words, and back.

Legend: n codes of b bits along the last dimension; code i lies in bits i*b .. i*b + b - 1 of the stream, so that it may
straddle two words. Eight codes, one a byte of a 64-bit number, are folded together by halves: pairs, fours, then all eight
leave b whole bytes, whatever b is. Both directions read numbers as bytes and so need a little-endian machine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 32


def packed_words(count: int, bits: int) -> int:
    """32-bit words that ``count`` codes take."""
    return -(-count * bits // WORD)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8, each below 2^bits, as words [..., ceil(n * bits / 32)] int32; unused bits are zero.

    Args:
        codes: on any device.
        bits: 1 to 8.
    """
    _check(bits)
    count = codes.shape[-1]
    padded = F.pad(codes, (0, -count % WORD))
    # Flat, since a tensor with a side of 1 may be contiguous and yet have strides that no wider type can be seen through.
    numbers = padded.contiguous().flatten().view(torch.int64).view(*padded.shape[:-1], padded.shape[-1] // 8)
    stream = _fold(numbers, bits)
    occupied = stream.flatten().view(torch.uint8).view(-1, 8)[:, :bits]
    words = occupied.contiguous().flatten().view(torch.int32).view(*padded.shape[:-1], padded.shape[-1] // WORD * bits)
    return words[..., : packed_words(count, bits)].contiguous()


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_bits`: the first ``count`` codes, [..., count] uint8."""
    _check(bits)
    chunks = -(-count // WORD)
    padded = F.pad(words, (0, chunks * bits - words.shape[-1]))
    occupied = padded.contiguous().flatten().view(torch.uint8).view(-1, bits)
    stream = F.pad(occupied, (0, 8 - bits)).contiguous().flatten().view(torch.int64)
    codes = _unfold(stream, bits).view(torch.uint8).view(*words.shape[:-1], chunks * WORD)
    return codes[..., :count].contiguous()


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bit streams hold codes of 1 to 8 bits, not {bits}")


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """Widths of the fields of each halving, their distance, and a mask of every other field."""
    steps = []
    for width, distance in ((bits << k, 8 << k) for k in range(3)):
        mask = sum(((1 << width) - 1) << place for place in range(0, 64, 2 * distance))
        steps.append((width, distance, mask))
    return steps


def _fold(numbers: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return numbers
    for width, distance, mask in _steps(bits):
        numbers = (numbers & mask) | ((numbers >> (distance - width)) & (mask << width))
    return numbers


def _unfold(numbers: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return numbers
    for width, distance, mask in reversed(_steps(bits)):
        numbers = (numbers & mask) | ((numbers & (mask << width)) << (distance - width))
    return numbers
