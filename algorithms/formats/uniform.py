"""How a calibration stores uniform codes, whatever they are exported to.

For a linear ``P`` of shape [O, I] with G groups: ``P.codes`` [O, ceil(I b / 32)] int32, a dense stream of b-bit codes;
``P.scales`` [O, G] float16; ``P.zeros`` [O, G] uint8, absent where the grid is symmetric; ``P.groups`` [I] int32, absent where
groups are runs of neighbours; ``P.shape`` [3] int64 = (O, I, b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from algorithms.formats.storage import to_storage
from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.uniform import UniformCodes

_PARTS = ("codes", "scales", "zeros", "groups", "shape")


def pack(weight: UniformCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.codes`` and so on; zeros must be whole numbers of 0 to 255."""
    tensors = {
        f"{prefix}.codes": pack_bits(weight.codes, weight.bits),
        f"{prefix}.scales": to_storage(weight.scales, f"{prefix}.scales"),
        f"{prefix}.shape": torch.tensor([*weight.codes.shape, weight.bits]),
    }
    if not is_symmetric(weight):
        assert torch.equal(weight.zeros, weight.zeros.round()), "uniform codes are stored with whole zeros"
        tensors[f"{prefix}.zeros"] = weight.zeros.to(torch.uint8)
    if weight.groups is not None:
        tensors[f"{prefix}.groups"] = weight.groups.clone()  # linears of one input share it in memory
    return tensors


def unpack(tensors: Mapping[str, Tensor], prefix: str) -> UniformCodes:
    """The inverse of :func:`pack`."""
    _, columns, bits = tensors[f"{prefix}.shape"].tolist()
    scales = tensors[f"{prefix}.scales"].float()
    zeros = tensors.get(f"{prefix}.zeros")
    return UniformCodes(
        codes=unpack_bits(tensors[f"{prefix}.codes"], bits, columns),
        scales=scales,
        zeros=torch.full_like(scales, 1 << (bits - 1)) if zeros is None else zeros.float(),
        bits=bits,
        groups=tensors.get(f"{prefix}.groups"),
    )


def is_symmetric(weight: UniformCodes) -> bool:
    """Whether every zero lies in the middle of the codes."""
    return bool((weight.zeros == 1 << (weight.bits - 1)).all())


def packed_linears(names: Sequence[str]) -> list[str]:
    """The linears ``P`` whose ``P.codes`` is among the names, sorted."""
    return sorted(name.removesuffix(".codes") for name in names if name.endswith(".codes"))


def rest(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that belong to no packed linear; biases are among them."""
    inside = {f"{prefix}.{part}" for prefix in packed_linears(list(tensors)) for part in _PARTS}
    return {name: tensor for name, tensor in tensors.items() if name not in inside}


def dense_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float32 in which every packed linear has become ``P.weight`` [O, I]."""
    state = {name: tensor.float() for name, tensor in rest(tensors).items()}
    for prefix in packed_linears(list(tensors)):
        state[f"{prefix}.weight"] = unpack(tensors, prefix).dequantize()
    return state


def stored_bits(weight: UniformCodes) -> Mapping[str, int]:
    """Bits of one linear by component: codes, scales in 16 bits, zeros in as many bits as a code, group indices in 32."""
    bits = {"codes": weight.codes.numel() * weight.bits, "scales": weight.scales.numel() * 16}
    if not is_symmetric(weight):
        bits["zeros"] = weight.zeros.numel() * weight.bits
    if weight.groups is not None:
        bits["groups"] = weight.groups.numel() * 32
    return bits
