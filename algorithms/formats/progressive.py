"""How a calibration stores progressive codes, whatever they are exported to.

For a linear ``P`` of shape [O, I] with G groups: ``P.codes`` [O, ceil(I b / 32)] int32, a dense stream of b-bit codes;
``P.row_scales`` [O] float16; ``P.group_scales`` [O, G] and ``P.zeros`` [O, G] uint8; ``P.shape`` [3] int64 = (O, I, b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from algorithms.formats.storage import to_storage
from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.grids.progressive import ProgressiveCodes

_PARTS = ("codes", "row_scales", "group_scales", "zeros", "shape")
_MARK = ".row_scales"  # no other way to store a linear has this part


def pack(weight: ProgressiveCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.codes`` and so on."""
    return {
        f"{prefix}.codes": pack_bits(weight.codes, weight.bits),
        f"{prefix}.row_scales": to_storage(weight.row_scales, f"{prefix}.row_scales"),
        f"{prefix}.group_scales": weight.group_scales.to(torch.uint8),
        f"{prefix}.zeros": weight.zeros.to(torch.uint8),
        f"{prefix}.shape": torch.tensor([*weight.codes.shape, weight.bits]),
    }


def unpack(tensors: Mapping[str, Tensor], prefix: str) -> ProgressiveCodes:
    """The inverse of :func:`pack`."""
    _, columns, bits = tensors[f"{prefix}.shape"].tolist()
    return ProgressiveCodes(
        codes=unpack_bits(tensors[f"{prefix}.codes"], bits, columns),
        row_scales=tensors[f"{prefix}.row_scales"].float(),
        group_scales=tensors[f"{prefix}.group_scales"],
        zeros=tensors[f"{prefix}.zeros"],
        bits=bits,
    )


def packed_linears(names: Sequence[str]) -> list[str]:
    """The linears ``P`` whose ``P.row_scales`` is among the names, sorted."""
    return sorted(name.removesuffix(_MARK) for name in names if name.endswith(_MARK))


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


def stored_bits(weight: ProgressiveCodes) -> Mapping[str, int]:
    """Bits of one linear by component: codes; scales in 16 bits a row and 8 a group; zeros in as many bits as a code."""
    return {
        "codes": weight.codes.numel() * weight.bits,
        "scales": weight.row_scales.numel() * 16 + weight.group_scales.numel() * 8,
        "zeros": weight.zeros.numel() * weight.bits,
    }
