"""A matrix as square frames of one channel with values from 0 to 1, and back.

Legend: O out_features, I in_features, p the side of a patch; a band is the ceil(I/p) patches of p neighbouring rows; N frames,
all bands one after another. The last rows and columns are padded with zeros, and nothing is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.numerics.residuals.vector_codes import spread_scales, tile_of, two_level
from algorithms.numerics.sparse_quantized import Statistics

_LARGEST = 512
# Padding costs embeddings: a patch that pads by more than this share is halved.
_MOST_PADDING = 0.125
# Few frames are few steps of training an epoch.
_FEWEST_FRAMES = 32
# Bands are batches where errors are weighed by whole rows.
_MOST_PIXELS = 1 << 20
_SMALLEST = 8
_SMALLEST_SCALE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Patches of side ``size`` of matrices of ``shape`` (O, I)."""

    shape: tuple[int, int]
    size: int

    @property
    def bands(self) -> int:
        """ceil(O/p)."""
        return -(-self.shape[0] // self.size)

    @property
    def a_band(self) -> int:
        """Frames a band, ceil(I/p)."""
        return -(-self.shape[1] // self.size)

    @property
    def count(self) -> int:
        """N."""
        return self.bands * self.a_band

    @property
    def padding(self) -> float:
        """Values that are padded, in shares of the matrix."""
        return self.count * self.size**2 / (self.shape[0] * self.shape[1]) - 1

    def cut(self, matrix: Tensor) -> Tensor:
        """The frames [N, 1, p, p] of a matrix [O, I]."""
        rows, columns = self.shape
        padded = F.pad(matrix, (0, self.a_band * self.size - columns, 0, self.bands * self.size - rows))
        parts = padded.view(self.bands, self.size, self.a_band, self.size)
        return parts.transpose(1, 2).reshape(self.count, 1, self.size, self.size)

    def rows(self, frames: Tensor) -> Tensor:
        """The rows [n * p, I] of n whole bands, from their frames [n * a_band, 1, p, p]."""
        parts = frames.reshape(-1, self.a_band, self.size, self.size)
        return parts.transpose(1, 2).reshape(-1, self.a_band * self.size)[:, : self.shape[1]]

    def joined(self, frames: Tensor) -> Tensor:
        """The inverse of :meth:`cut`."""
        return self.rows(frames)[: self.shape[0]]


def patch_size(shape: tuple[int, int], stride: int) -> int:
    """The side of patches for a matrix of ``shape`` (O, I) where none is asked for.

    The largest power of two times ``stride``, at most 512, that fits both sides, gives 32 frames or more, pads by no more than
    an eighth and has no more than 2^20 values a band, but no less than 8.

    Args:
        shape: of the matrix.
        stride: how many times larger than an embedding a frame is.
    """
    size = stride
    while 2 * size <= min(_LARGEST, *shape):
        size *= 2
    while size % (2 * stride) == 0 and size >= 2 * _SMALLEST:
        patches = Patches(shape=shape, size=size)
        small = patches.count >= _FEWEST_FRAMES and size * shape[1] <= _MOST_PIXELS
        if small and patches.padding <= _MOST_PADDING:
            break
        size //= 2
    return size


def block_scales(matrix: Tensor, block_size: int) -> Statistics:
    """The largest magnitude of every run of ``block_size`` columns of a row, [O * T, 1], as it is stored in two levels."""
    tiles = num_tiles(matrix.shape[1], block_size)
    tile = tile_of(matrix.shape[1], tiles, matrix.device).expand(matrix.shape)
    largest = matrix.new_zeros(matrix.shape[0], tiles).scatter_reduce_(1, tile, matrix.abs(), "amax")
    return two_level(largest.clamp(min=_SMALLEST_SCALE))


def num_tiles(columns: int, block_size: int) -> int:
    """T: as few runs as have at most ``block_size`` columns."""
    return -(-columns // min(columns, block_size))


def spread(scales: Tensor, shape: Sequence[int]) -> Tensor:
    """The scale of every weight, [O, I], from those of blocks, [O, T]."""
    return spread_scales(scales, torch.Size(shape), None)


def as_pixels(matrix: Tensor, scales: Tensor) -> Tensor:
    """A matrix over its scales, both [O, I], moved from [-1, 1] to [0, 1]; what rounded scales leave beyond is cut."""
    # The scale of a block of zeros is zero once it is rounded.
    return (0.5 * matrix / scales.clamp(min=_SMALLEST_SCALE) + 0.5).clamp(0, 1)


def from_pixels(pixels: Tensor, scales: Tensor) -> Tensor:
    """The inverse of :func:`as_pixels`."""
    return (2 * pixels - 1) * scales
