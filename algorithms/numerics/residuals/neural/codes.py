"""A residual as the output of a small decoder: how it is stored.

Legend: O out_features, I in_features, N frames of side p, c channels of an embedding, S the product of the strides, T blocks of
columns a row.

    R_hat = scales * (2 * decoder(embedding) - 1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.residuals.coder import stored_bits
from algorithms.numerics.residuals.neural.layout import DecoderLayout
from algorithms.numerics.residuals.neural.network import Convolutions, decode_frames
from algorithms.numerics.residuals.neural.patches import Patches, from_pixels, spread
from algorithms.numerics.residuals.neural.quantizers import embedding_values, weight_values
from algorithms.numerics.residuals.vector_codes import packed_scales, two_level, unpacked_scales
from algorithms.numerics.sparse_quantized import Statistics

_FRAMES = 16  # that are decoded at a time


@dataclass(frozen=True, kw_only=True)
class NeuralCodes:
    """Codes of embeddings [N, c, p/S, p/S] and of decoder weights, int64, with float16 scales and biases of the latter's rows.

    ``scales`` are those of blocks, [O * T, 1] in two levels; ``shape`` is (O, I).
    """

    layout: DecoderLayout
    embedding: Tensor
    weights: Sequence[Tensor]
    row_scales: Sequence[Tensor]
    biases: Sequence[Tensor]
    scales: Statistics
    shape: tuple[int, int]

    @cached_property
    def _pixels(self) -> Tensor:
        """The matrix [O, I] before scales: the decoder's one pass, whose result tuning of scales uses again and again."""
        layout, device = self.layout, self.embedding.device
        weights = [weight_values(codes.float(), scales) for codes, scales in zip(self.weights, self.row_scales, strict=True)]
        decoder = Convolutions(weights=weights, biases=self.biases)
        tops = layout.value_tops(self.embedding.shape[0]).to(device)
        # Other strides are other orders of sums.
        values = embedding_values(self.embedding.float(), tops).contiguous()
        with torch.no_grad():
            frames = [decode_frames(decoder, layout.strides, part) for part in values.split(_FRAMES)]
        return Patches(shape=self.shape, size=layout.patch).joined(torch.cat(frames))

    def movable(self) -> dict[str, Tensor]:
        """The scales of blocks [O, T]."""
        return {"scales": self.scales.decode().view(self.shape[0], -1)}

    def decode(self, values: Mapping[str, Tensor]) -> Tensor:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        return from_pixels(self._pixels, spread(values["scales"], self.shape))

    def moved(self, values: Mapping[str, Tensor]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        return replace(self, scales=two_level(values["scales"]))

    def dequantize(self) -> Tensor:
        """The matrix [O, I] float32."""
        return self.decode(self.movable())

    def bits(self) -> Mapping[str, int]:
        """Codes of embeddings; the decoder's weights, their scales and biases; scales of blocks; and the header of sizes.

        Further bits that some codes of both have are one stream, and a word that they share is the decoder's.
        """
        sizes = {name: stored_bits(tensor) for name, tensor in self.tensors().items()}
        longer = min(self.layout.longer_values, sizes.get("high_codes", 0))
        decoder = ("decoder", "scales", "high_codes")
        scales = ("scale_codes", "run_scales", "run_zeros")
        return {
            "codes": sizes["embedding"] + longer,
            "decoder": sum(sizes.get(name, 0) for name in decoder) - longer,
            "scales": sum(sizes[name] for name in scales),
            "layout": sizes["header"],
        }

    def tensors(self) -> dict[str, Tensor]:
        """Bit streams of both kinds of codes, ``scales`` of rows with biases behind them, scales of blocks and all sizes.

        ``high_codes`` are the further bits, first of embeddings and then of the decoder; left out where there are none.
        """
        layout = self.layout
        values = self.embedding.transpose(0, 1).flatten()
        raised = [codes + top.long().view(-1, 1, 1, 1) for codes, top in zip(self.weights, self._row_tops(), strict=True)]
        weights = torch.cat([codes.flatten() for codes in raised])
        high = torch.cat(
            [values[: layout.longer_values] >> layout.embedding_bits, weights[self._longer_weights()] >> layout.weight_bits]
        )
        tensors = {
            "embedding": _packed(values, layout.embedding_bits),
            "decoder": _packed(weights, layout.weight_bits),
            "scales": torch.cat([*self.row_scales, *self.biases]).half(),
            **packed_scales(self.scales),
            "header": layout.header(),
        }
        return {**tensors, "high_codes": _packed(high, 1)} if high.numel() else tensors

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Self:
        """See :class:`algorithms.numerics.residuals.coder.CodedResidual`."""
        layout, device = DecoderLayout.read(tensors["header"]), tensors["embedding"].device
        frames = Patches(shape=shape, size=layout.patch).count
        places = layout.embedding_shape(frames)
        values = unpack_bits(tensors["embedding"], layout.embedding_bits, layout.values(frames)).long()
        sizes, rows = ([layer.outputs * layer.row for layer in layout.layers], [layer.outputs for layer in layout.layers])
        weights = unpack_bits(tensors["decoder"], layout.weight_bits, sum(sizes)).long()
        longer = _longer(layout).to(device)
        count = layout.longer_values + int(longer.sum())
        if count:
            high = unpack_bits(tensors["high_codes"], 1, count).long()
            values[: layout.longer_values] |= high[: layout.longer_values] << layout.embedding_bits
            weights[longer] |= high[layout.longer_values :] << layout.weight_bits
        tops = [top.long().view(-1, 1, 1, 1).to(device) for top in layout.row_tops()]
        parts = [part.view(layer.shape) for part, layer in zip(weights.split(sizes), layout.layers, strict=True)]
        scales, biases = tensors["scales"].float().chunk(2)
        return cls(
            layout=layout,
            embedding=values.view(places[1], places[0], *places[2:]).transpose(0, 1).contiguous(),
            weights=[part - top for part, top in zip(parts, tops, strict=True)],
            row_scales=scales.split(rows),
            biases=biases.split(rows),
            scales=unpacked_scales(tensors),
            shape=shape,
        )

    def _row_tops(self) -> list[Tensor]:
        return [top.to(self.embedding.device) for top in self.layout.row_tops()]

    def _longer_weights(self) -> Tensor:
        return _longer(self.layout).to(self.embedding.device)


def _longer(layout: DecoderLayout) -> Tensor:
    """Which weights, all in a row, have a bit more than the others."""
    pairs = zip(layout.row_bits(), layout.layers, strict=True)
    return torch.cat([(bits > layout.weight_bits).repeat_interleave(layer.row) for bits, layer in pairs])


def _packed(codes: Tensor, bits: int) -> Tensor:
    return pack_bits((codes & ((1 << bits) - 1)).to(torch.uint8), bits)
