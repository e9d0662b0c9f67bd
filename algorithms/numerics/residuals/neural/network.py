"""The decoder, and the encoder that training needs: functions of tensors, which are all there is to them.

Legend: n frames of side p, c channels of an embedding, S the product of the strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.numerics.residuals.neural.layout import DecoderLayout

_DEPTHWISE_KERNEL = 7
_EXPANSION = 4


@dataclass(frozen=True, kw_only=True)
class Convolutions:
    """The ``weights`` [outputs, inputs, k, k] and ``biases`` [outputs] of a decoder's layers."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]

    def copied(self) -> Convolutions:
        """The same values in tensors of their own."""
        weights, biases = ([tensor.detach().clone() for tensor in part] for part in (self.weights, self.biases))
        return Convolutions(weights=weights, biases=biases)

    def to(self, device: torch.device) -> Convolutions:
        """The same on a device."""
        weights, biases = ([tensor.to(device) for tensor in part] for part in (self.weights, self.biases))
        return Convolutions(weights=weights, biases=biases)


def decode_frames(decoder: Convolutions, strides: Sequence[int], embedding: Tensor) -> Tensor:
    """Frames [n, 1, p, p] with values from 0 to 1 of an embedding [n, c, p/S, p/S]."""
    layers = list(zip(decoder.weights, decoder.biases, strict=True))
    states = F.gelu(F.conv2d(embedding, *layers[0]))
    for (weight, bias), stride in zip(layers[1:-1], strides, strict=True):
        states = F.gelu(F.pixel_shuffle(F.conv2d(states, weight, bias, padding=weight.shape[-1] // 2), stride))
    weight, bias = layers[-1]
    return 0.5 * torch.tanh(F.conv2d(states, weight, bias, padding=1)) + 0.5


def new_decoder(layout: DecoderLayout, generator: torch.Generator) -> Convolutions:
    """Weights and biases drawn evenly up to 1/sqrt of the weights of a row."""
    weights, biases = [], []
    for layer in layout.layers:
        bound = layer.row**-0.5
        weights.append(_uniform(layer.shape, bound, generator))
        biases.append(_uniform((layer.outputs,), bound, generator))
    return Convolutions(weights=weights, biases=biases)


def encode_frames(encoder: Mapping[str, Tensor], strides: Sequence[int], frames: Tensor) -> Tensor:
    """Embeddings [n, c, p/S, p/S] between -1 and 1 of frames [n, 1, p, p]: a ConvNeXt stage a stride (arXiv 2201.03545)."""
    states = 2 * frames - 1
    for stage, stride in enumerate(strides):
        part = {name.removeprefix(f"{stage}."): value for name, value in encoder.items() if name.startswith(f"{stage}.")}
        states = _normalized(F.conv2d(states, part["down"], part["down_bias"], stride=stride))
        wide = F.conv2d(states, part["mix"], part["mix_bias"], padding=_DEPTHWISE_KERNEL // 2, groups=states.shape[1])
        wide = F.gelu(F.conv2d(_normalized(wide), part["expand"], part["expand_bias"]))
        states = states + F.conv2d(wide, part["contract"], part["contract_bias"])
    return torch.tanh(F.conv2d(states, encoder["head"], encoder["head_bias"]))


def new_encoder(layout: DecoderLayout, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An encoder of ``width`` channels for the embeddings of ``layout``."""
    found: dict[str, Tensor] = {}

    def _add(name: str, outputs: int, inputs: int, kernel: int) -> None:
        bound = (inputs * kernel**2) ** -0.5
        found[name] = _uniform((outputs, inputs, kernel, kernel), bound, generator)
        found[f"{name}_bias"] = torch.zeros(outputs)

    for stage, stride in enumerate(layout.strides):
        _add(f"{stage}.down", width, width if stage else 1, stride)
        _add(f"{stage}.mix", width, 1, _DEPTHWISE_KERNEL)
        _add(f"{stage}.expand", _EXPANSION * width, width, 1)
        _add(f"{stage}.contract", width, _EXPANSION * width, 1)
    _add("head", layout.embedding_dim, width, 1)
    return found


def _normalized(states: Tensor) -> Tensor:
    """Each place by the mean and the spread of its channels; the convolution behind it takes the place of gains."""
    return F.layer_norm(states.permute(0, 2, 3, 1), states.shape[1:2]).permute(0, 3, 1, 2)


def _uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
