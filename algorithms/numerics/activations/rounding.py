"""Activations as a server holds them, rounded to integers and back: inputs of linears, keys and values.

Everything here is differentiable: gradients pass the rounding as if it were not there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from algorithms.numerics.uniform import stored_scales


def fake_quantize_tokens(inputs: Tensor, bits: int) -> Tensor:
    """Inputs [..., n] on a symmetric grid for each token, found as they come.

    Bit for bit what compressed-tensors computes at run time for ``strategy: token``, ``dynamic: true``, in the dtype of the
    inputs [batch, length, n]:

        s = max |x| / ((2^b - 1) / 2)      the divisor is 127.5 for 8 bits; a token of zeros gets the dtype's epsilon
        q = round(clamp(x / s, -2^(b - 1), 2^(b - 1) - 1))      ties to even
        x_hat = s q

    The value of greatest size lies half a step beyond a code: 127.5 steps become 127; from -127.5 steps, a tie, the last bit of
    the division makes -127 or -128. Inputs that differ in rounding alone may so differ by a step afterwards. QServe's kernels
    divide by 127. Where the library is given [tokens, n], it takes one scale for all tokens.
    """
    scales = inputs.detach().abs().amax(-1, keepdim=True) / (((1 << bits) - 1) / 2)
    scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)
    return fake_quantize_static(inputs, scales, bits)


def fake_quantize_static(inputs: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Inputs on a symmetric grid that is known beforehand, as compressed-tensors does with ``dynamic: false``.

    Args:
        inputs: [..., n].
        scales: one number, or whatever broadcasts to the inputs.
        bits: of a code, which lies in -2^(b - 1) .. 2^(b - 1) - 1.
    """
    half = 1 << (bits - 1)
    codes = (inputs.detach() / scales).clamp_(-half, half - 1).round_()
    return _straight_through(codes * scales, inputs)


def fake_quantize_cache(
    states: Tensor, bits: int, group_size: int, *, symmetric: bool = False, whole_zeros: bool = True
) -> Tensor:
    """Keys or values [..., head_dim] as a cache holds them: a grid for each token, head and group of channels.

    Scales are float16 values. Asymmetric codes are 0 .. 2^b - 1 and span minimum to maximum; symmetric ones reach as far below
    zero as above, (2^(b - 1) - 1) s.

    Args:
        states: in float32.
        bits: of a code.
        group_size: channels that share a grid; the last group of a head may be smaller.
        symmetric: as above.
        whole_zeros: zero points are codes, and the range holds zero. Else they are float16 numbers -min / s as QServe's
            kernels store them: finer, unless a group's spread is small beside its values.
    """
    groups = states.detach().split(group_size, -1)
    quantize = _symmetric_group if symmetric else _whole_zero_group if whole_zeros else _stored_zero_group
    return _straight_through(torch.cat([quantize(group, bits) for group in groups], -1), states)


def _symmetric_group(group: Tensor, bits: int) -> Tensor:
    top = (1 << (bits - 1)) - 1
    scales = stored_scales(group.abs().amax(-1, keepdim=True) / top)
    return (group / scales).round_().clamp_(-top, top) * scales


def _whole_zero_group(group: Tensor, bits: int) -> Tensor:
    low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
    scales = stored_scales((high - low) / ((1 << bits) - 1))
    return _on_grid(group, scales, torch.round(-low / scales), bits)


def _stored_zero_group(group: Tensor, bits: int) -> Tensor:
    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    scales = stored_scales((high - low) / ((1 << bits) - 1))
    limit = torch.finfo(torch.float16).max
    return _on_grid(group, scales, (-low / scales).clamp(-limit, limit).half().float(), bits)


def _on_grid(group: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    codes = (group / scales + zeros).round_().clamp_(0, (1 << bits) - 1)
    return (codes - zeros) * scales


def _straight_through(values: Tensor, inputs: Tensor) -> Tensor:
    """``values``, with the gradient of ``inputs``: a difference of zero is added, so that values stay on their grid."""
    return values + (inputs - inputs.detach()) if inputs.requires_grad else values
