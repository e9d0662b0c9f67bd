"""The sizes of a decoder: which layers it has, and what all that is stored takes.

Legend: N frames of side p, c channels of an embedding, S the product of the strides s, so that an embedding is c x p/S x p/S.
The decoder is a 1 x 1 convolution to ``widths[0]`` channels, for every stride a convolution whose channels become frames s
times larger, and a 3 x 3 convolution to one channel. A row of it is all that leads to one channel of one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from algorithms.numerics.bit_packing import WORD, packed_words

_HALF = 16
_LARGEST_KERNEL = 5
_FIXED = 6  # numbers of a header that do not depend on the strides


class Layer(NamedTuple):
    """A convolution: channels of its output and its input, and the side of its kernel."""

    outputs: int
    inputs: int
    kernel: int

    @property
    def row(self) -> int:
        """Weights that lead to one channel of the output."""
        return self.inputs * self.kernel**2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weights."""
        return self.outputs, self.inputs, self.kernel, self.kernel


@dataclass(frozen=True, kw_only=True)
class DecoderLayout:
    """Sizes of everything but the matrix and its scales.

    ``widths`` are 1 + len(strides) channels. Of embeddings, channel by channel through all frames, the first ``longer_values``
    have a bit more than ``embedding_bits``. Of decoder weights, up to ``longer_weights``, in whole rows, have a bit more than
    ``weight_bits``.
    """

    patch: int
    embedding_dim: int
    embedding_bits: int
    weight_bits: int
    strides: tuple[int, ...]
    widths: tuple[int, ...] = ()
    longer_values: int = 0
    longer_weights: int = 0

    @property
    def stride(self) -> int:
        """S."""
        return math.prod(self.strides)

    @property
    def layers(self) -> list[Layer]:
        """All convolutions, the last included."""
        found = [Layer(self.widths[0], self.embedding_dim, 1)]
        for stage, stride in enumerate(self.strides):
            kernel = min(1 + 2 * stage, _LARGEST_KERNEL)
            found.append(Layer(self.widths[stage + 1] * stride**2, self.widths[stage], kernel))
        return [*found, Layer(1, self.widths[-1], 3)]

    def values(self, frames: int) -> int:
        """How many values embeddings of ``frames`` have."""
        return math.prod(self.embedding_shape(frames))

    def embedding_shape(self, frames: int) -> tuple[int, int, int, int]:
        """(N, c, p/S, p/S)."""
        side = self.patch // self.stride
        return frames, self.embedding_dim, side, side

    def value_tops(self, frames: int) -> Tensor:
        """The largest code of every value, [N, c, p/S, p/S] float32."""
        count, channels, *sides = self.embedding_shape(frames)
        longer = torch.arange(self.values(frames)) < self.longer_values
        tops = ((1 << (self.embedding_bits + longer.long())) - 1).float()
        return tops.view(channels, count, *sides).transpose(0, 1).contiguous()

    def row_bits(self) -> list[Tensor]:
        """Bits of the codes of every row, [R] int64 for each layer.

        One row after another, from the first, gets the further bit for its weights while enough of them are left to give.
        """
        left, bits = self.longer_weights, []
        for layer in self.layers:
            longer = min(layer.outputs, left // layer.row)
            left -= longer * layer.row
            bits.append(torch.tensor([self.weight_bits + 1] * longer + [self.weight_bits] * (layer.outputs - longer)))
        return bits

    def weights_with_more(self) -> int:
        """How many weights have a bit more than the others."""
        pairs = zip(self.row_bits(), self.layers, strict=True)
        return sum(int((bits > self.weight_bits).sum()) * layer.row for bits, layer in pairs)

    def row_tops(self) -> list[Tensor]:
        """The largest code of every row, [R] float32 for each layer."""
        return [((1 << (bits - 1)) - 1).float() for bits in self.row_bits()]

    def header(self) -> Tensor:
        """All sizes, int32."""
        fixed = (
            self.patch, self.embedding_dim, self.embedding_bits, self.weight_bits, self.longer_values, self.longer_weights,
        )  # fmt: skip
        return torch.tensor([*fixed, *self.strides, *self.widths], dtype=torch.int32)

    @classmethod
    def read(cls, header: Tensor) -> Self:
        """The inverse of :meth:`header`."""
        patch, dim, embedding_bits, weight_bits, longer_values, longer_weights, *rest = header.tolist()
        stages = (len(rest) - 1) // 2
        return cls(
            patch=patch,
            embedding_dim=dim,
            embedding_bits=embedding_bits,
            weight_bits=weight_bits,
            strides=tuple(rest[:stages]),
            widths=tuple(rest[stages:]),
            longer_values=longer_values,
            longer_weights=longer_weights,
        )

    def stored_size(self, frames: int) -> int:
        """Bits of embeddings, decoder and header."""
        rows = sum(layer.outputs for layer in self.layers)
        weights = sum(layer.outputs * layer.row for layer in self.layers)
        longer = self.longer_values + self.weights_with_more()
        streams = (self.values(frames) * self.embedding_bits, weights * self.weight_bits, longer)
        floats = 2 * rows * _HALF  # a scale and a bias
        return sum(WORD * packed_words(size, 1) for size in streams) + floats + WORD * (_FIXED + 2 * len(self.strides) + 1)
