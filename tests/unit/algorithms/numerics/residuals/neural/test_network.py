import math

import pytest
import torch

from algorithms.numerics.residuals.neural.layout import DecoderLayout
from algorithms.numerics.residuals.neural.network import decode_frames, encode_frames, new_decoder, new_encoder

LAYOUT = DecoderLayout(
    patch=12, embedding_dim=2, embedding_bits=3, weight_bits=4, strides=(2, 3), widths=(3, 2, 2)
)  # fmt: skip


def _gelu(value):
    return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))


def _convolution(states, weight, bias):
    """One frame, place by place, in float64."""
    outputs, _, side, _ = weight.shape
    height, width = states.shape[1:]
    found = torch.zeros(outputs, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for down in range(side):
                for right in range(side):
                    y, x = row + down - side // 2, column + right - side // 2
                    if 0 <= y < height and 0 <= x < width:
                        found[:, row, column] += weight[:, :, down, right] @ states[:, y, x]
    return found + bias[:, None, None]


def _enlarged(states, stride):
    """Channels c s^2 as frames s times larger."""
    channels, height, width = states.shape
    found = torch.zeros(channels // stride**2, height * stride, width * stride, dtype=torch.float64)
    for channel in range(channels):
        place = channel % stride**2
        found[channel // stride**2, place // stride :: stride, place % stride :: stride] = states[channel]
    return found


def test_a_decoder_computes_what_its_layers_do_one_by_one():
    generator = torch.Generator().manual_seed(0)
    decoder = new_decoder(LAYOUT, generator)
    embedding = torch.randn(2, 2, 2, 2, generator=generator)
    frames = decode_frames(decoder, LAYOUT.strides, embedding)
    assert frames.shape == (2, 1, 12, 12)
    for frame, states in zip(frames, embedding.double(), strict=True):
        layers = [(weight.double(), bias.double()) for weight, bias in zip(decoder.weights, decoder.biases, strict=True)]
        states = _gelu(_convolution(states, *layers[0]))
        for layer, stride in zip(layers[1:-1], LAYOUT.strides, strict=True):
            states = _gelu(_enlarged(_convolution(states, *layer), stride))
        wanted = 0.5 * torch.tanh(_convolution(states, *layers[-1])) + 0.5
        torch.testing.assert_close(frame.double(), wanted, atol=1e-6, rtol=1e-5)


def test_an_encoder_sees_its_frame_alone_and_gives_what_a_decoder_takes():
    generator = torch.Generator().manual_seed(0)
    encoder = new_encoder(LAYOUT, 8, generator)
    frames = torch.rand(3, 1, 12, 12, generator=generator)
    embedding = encode_frames(encoder, LAYOUT.strides, frames)
    assert embedding.shape == LAYOUT.embedding_shape(3)
    assert embedding.abs().max() < 1
    frames[1] = 0.5
    again = encode_frames(encoder, LAYOUT.strides, frames)
    torch.testing.assert_close(again[[0, 2]], embedding[[0, 2]])
    assert not torch.allclose(again[1], embedding[1])


def test_first_weights_come_from_the_generator_alone():
    state = torch.get_rng_state()
    first, second, other = (new_decoder(LAYOUT, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one, two) for one, two in zip(first.weights, second.weights, strict=True))
    assert not torch.equal(first.weights[0], other.weights[0])
    assert torch.equal(torch.get_rng_state(), state)
    for weight, layer in zip(first.weights, LAYOUT.layers, strict=True):
        assert weight.abs().max() <= layer.row**-0.5
    spread = torch.cat([weight.flatten() * layer.row**0.5 for weight, layer in zip(first.weights, LAYOUT.layers, strict=True)])
    assert spread.std().item() == pytest.approx(3**-0.5, abs=0.08)
