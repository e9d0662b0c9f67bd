import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from torch import nn

from algorithms.numerics.activations.rounding import fake_quantize_cache, fake_quantize_static, fake_quantize_tokens


def _inputs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[-1])
    values[0, 0] = 0
    values[0, 1] = 3.25
    values[0, 2] = -torch.arange(shape[-1]) / 8
    return values


def _client(bits, **settings):
    module = nn.Linear(1, 1)
    module.quantization_status = QuantizationStatus.FROZEN
    return module, QuantizationArgs(num_bits=bits, type="int", symmetric=True, **settings)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_are_quantized_as_the_client_does_it(bits, dtype):
    inputs = _inputs(3, 17, 40).to(dtype)
    module, args = _client(bits, strategy="token", dynamic=True)
    found = fake_quantize_tokens(inputs, bits)
    assert found.dtype == dtype
    assert torch.equal(found, forward_quantize(module, inputs, "input", args))


def test_a_static_grid_is_the_clients():
    inputs = _inputs(3, 17, 40)
    module, args = _client(8, strategy="tensor", dynamic=False)
    module.input_scale = torch.tensor([0.7])
    assert torch.equal(fake_quantize_static(inputs, torch.tensor(0.7), 8), forward_quantize(module, inputs, "input", args))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tokens_by_hand_in_float64(bits):
    inputs = _inputs(2, 9, 24, seed=1).double()
    found = fake_quantize_tokens(inputs, bits)
    for token, values in zip(inputs.flatten(0, 1).tolist(), found.flatten(0, 1).tolist(), strict=True):
        step = max(map(abs, token)) / ((2**bits - 1) / 2)
        codes = [min(max(round(value / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) if step else 0 for value in token]
        assert values == pytest.approx([code * step for code in codes], rel=1e-12, abs=0)
        assert max(abs(a - b) for a, b in zip(token, values, strict=True)) <= step / 2 * (1 + 1e-12)


def test_a_tokens_grid_is_its_own():
    inputs = _inputs(2, 9, 24, seed=1)
    assert torch.equal(fake_quantize_tokens(inputs, 8)[1:, 3:5], fake_quantize_tokens(inputs[1:, 3:5], 8))
    states = inputs[:, None].expand(2, 3, 9, 24)
    assert torch.equal(fake_quantize_cache(states, 4, 8)[:, 1:2, 4:], fake_quantize_cache(states[:, 1:2, 4:], 4, 8))


def test_the_ends_of_a_token():
    found = fake_quantize_tokens(torch.tensor([[[127.5, -127.5, 0.5, 1.5, -2.5]]]), 8)
    assert found.tolist() == [[[127.0, -128.0, 0.0, 2.0, -2.0]]]


def _whole(group, top):
    low, high = min(0.0, *group), max(0.0, *group)
    step = _half(max((high - low) / top, 2**-20))
    zero = round(-low / step)
    return step, [(min(max(round(value / step + zero), 0), top) - zero) * step for value in group]


def _stored(group, top):
    low, high = min(group), max(group)
    step = _half(max((high - low) / top, 2**-20))
    zero = _half(min(max(-low / step, -65504), 65504))
    return step, [(min(max(round(value / step + zero), 0), top) - zero) * step for value in group]


def _symmetric(group, top):
    top = top // 2
    step = _half(max(max(map(abs, group)) / top, 2**-20))
    return step, [min(max(round(value / step), -top), top) * step for value in group]


def _half(value):
    return torch.tensor(value, dtype=torch.float64).half().item()


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [({}, _whole), ({"whole_zeros": False}, _stored), ({"symmetric": True}, _symmetric)],
    ids=["whole", "stored", "symmetric"],
)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 8), (8, 16), (3, 7)])
def test_caches_by_hand_in_float64(settings, by_hand, bits, group_size):
    states = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(2)).double() + 0.3
    states[0, 0, 0] = 0
    found = fake_quantize_cache(states, bits, group_size, **settings)
    for token, values in zip(states.flatten(0, 2).tolist(), found.flatten(0, 2).tolist(), strict=True):
        for start in range(0, 24, group_size):
            group = token[start : start + group_size]
            step, expected = by_hand(group, 2**bits - 1)
            assert values[start : start + group_size] == pytest.approx(expected, abs=1e-12)
            errors = [abs(a - b) for a, b in zip(group, values[start : start + group_size], strict=True)]
            # A float16 scale may fall short by a part in 2048, for each of the steps that the range has.
            assert max(errors) <= step / 2 * (1 + (2**bits - 1) / 1024)


def test_a_group_has_its_own_grid():
    states = torch.randn(1, 2, 6, 32)
    large = states.clone()
    large[..., 16:] *= 1000
    found, other = fake_quantize_cache(states, 4, 16), fake_quantize_cache(large, 4, 16)
    assert torch.equal(found[..., :16], other[..., :16])
    assert not torch.equal(fake_quantize_cache(large, 4, 32)[..., :16], found[..., :16])
    assert all(len(set(row)) <= 16 for row in found[..., :16].flatten(0, 2).tolist())


@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_tokens_survive(value, symmetric):
    states = torch.full((1, 1, 2, 16), value)
    found = fake_quantize_cache(states, 4, 16, symmetric=symmetric)
    torch.testing.assert_close(found, states, rtol=2**-10, atol=2**-21)


def test_zero_stays_zero_with_whole_zeros():
    states = torch.randn(4, 2, 8, 16, generator=torch.Generator().manual_seed(3))
    states[..., ::3] = 0
    assert torch.all(fake_quantize_cache(states, 4, 16)[..., ::3] == 0)


def test_stored_zeros_are_finer_where_a_head_is_far_from_zero():
    states = torch.rand(64, 32, generator=torch.Generator().manual_seed(5)) + 1
    errors = [
        (fake_quantize_cache(states, 4, 32, whole_zeros=whole) - states).square().mean().sqrt() for whole in (False, True)
    ]
    # Steps of 1/15 and of 2/15 give errors of step / sqrt(12).
    assert errors[0].item() == pytest.approx(1 / 15 / math.sqrt(12), rel=0.1)
    assert errors[1].item() == pytest.approx(2 / 15 / math.sqrt(12), rel=0.1)


@pytest.mark.parametrize(
    "quantize",
    [
        lambda x: fake_quantize_tokens(x, 8),
        lambda x: fake_quantize_static(x, torch.tensor(0.003), 8),
        lambda x: fake_quantize_cache(x, 4, 8),
        lambda x: fake_quantize_cache(x, 4, 8, symmetric=True),
    ],
)
def test_gradients_pass_and_values_stay_on_the_grid(quantize):
    inputs = torch.randn(20, 30, 16, generator=torch.Generator().manual_seed(4))
    direction = torch.randn(20, 30, 16)
    followed = inputs.clone().requires_grad_()
    outputs = quantize(followed)
    assert torch.equal(outputs, quantize(inputs))
    (outputs * direction).sum().backward()
    assert torch.equal(followed.grad, direction)
    assert not torch.equal(outputs, inputs)
