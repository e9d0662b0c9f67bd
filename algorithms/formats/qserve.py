"""QServe's layouts of weights for products with 8-bit activations: of 4 bits (W4A8), and of 8 (W8A8).

QServe reads both, SGLang (``qoq``) that of 4 bits.

Legend: O out_features, I in_features, G = I / 128 groups a row. For a linear ``P``: ``P.qweight`` [O, I/2] int8, two codes a
byte; ``P.s1_scales`` [O] float16, one scale a row; with one grid a row ``P.s1_szeros`` [O] float16, scale * zero; with
progressive codes ``P.s2_scales`` [G, O] int8, the group scales, and ``P.s2_zeros`` [G, O] int8, -zero * scale modulo 256, both
with every 32 outputs in the order 0, 8, 16, 24, 1, 9, ...: a thread of the kernel reads those of four rows as one 32-bit word.

In ``qweight``, tiles of 32 rows by 32 columns follow one another, a row of tiles after the other. For row 16a + 8b + m and
column 16c + 4n + r of a tile, byte (((m * 4 + n) * 2 + c) * 2 + b) * 4 + r holds the code of a = 0 low and that of a = 1 high.

With a token x = s_x * x8, where s_x is max |x| / 127 and x8 is rounded to nearest, the kernels compute

    one grid a row  s1 * s_x * sum(q x8) - s1_szero * sum(x)                x as it was before it was rounded
    progressive     s1 * s_x * sum((q * s2 + s2_zero) x8)                   four codes in one 32-bit multiplication by s2

so that group scales above 17 would carry into the next code.

Of 8 bits, symmetric, with one grid a row: ``P.weight`` [O, I] int8 and ``P.dequant_scale`` [O] float16. Nothing is reordered;
the kernel computes dequant_scale * s_x * sum(weight x8).

QServe's converter leaves a pickled state dict (``pytorch_model.bin``) of these tensors; its loader takes safetensors where
there are any and does not look at ``quantization_config``, which SGLang needs. QServe loads no norms and takes them for ones:
they have to be folded into the linears; nor does it know tied embeddings. All this is read in their sources; neither was run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.formats import progressive, uniform
from algorithms.formats.storage import WHOLE_ROW, to_storage
from algorithms.modeling.source import ModelError
from algorithms.numerics.grids.progressive import ProgressiveCodes
from algorithms.numerics.uniform import UniformCodes

BITS, WIDE_BITS = 4, 8
ACTIVATION_BITS = 8
GROUP_SIZE = 128
QUANT_METHOD = "qoq"  # SGLang's word for it
PARTS = ("qweight", "s1_scales", "s1_szeros", "s2_scales", "s2_zeros")
WIDE_PARTS = ("weight", "dequant_scale")
_TILE = 32
_LARGEST_SCALE = 17  # times the largest code, 15, it still fits a byte


def pack_channel(weight: UniformCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of a linear with one grid a row, named ``<prefix>.qweight`` and so on.

    Raises:
        ModelError: sides, groups or zeros that the layout cannot hold, or a scale beyond float16.
    """
    _check_sides(prefix, weight.codes, group_size=WHOLE_ROW)
    if weight.bits != BITS or weight.scales.shape[1] != 1:
        raise ModelError(f"{prefix}: QServe's per-channel layout holds codes of 4 bits with one scale a row")
    zeros = weight.zeros
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < 1 << BITS)).all()):
        raise ModelError(f"{prefix} has zeros off the grid 0 .. 15, which QServe's layout cannot hold")
    scales = to_storage(weight.scales[:, 0], f"{prefix}.s1_scales")
    return {
        f"{prefix}.qweight": _pack_tiles(weight.codes),
        f"{prefix}.s1_scales": scales.contiguous(),
        f"{prefix}.s1_szeros": to_storage(scales.float() * zeros[:, 0], f"{prefix}.s1_szeros"),
    }


def pack_group(weight: ProgressiveCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of a linear with progressive codes, named ``<prefix>.qweight`` and so on.

    Raises:
        ModelError: sides, groups or integers that the layout cannot hold, or a scale beyond float16.
    """
    _check_sides(prefix, weight.codes, group_size=GROUP_SIZE)
    if weight.bits != BITS or weight.group_size != GROUP_SIZE:
        raise ModelError(f"{prefix}: QServe's per-group layout holds codes of 4 bits in groups of {GROUP_SIZE} columns")
    scales, zeros, integers = weight.group_scales, weight.zeros, weight.intermediate()
    if scales.min() < 1 or scales.max() > _LARGEST_SCALE or zeros.max() >= 1 << BITS:
        raise ModelError(f"{prefix}: QServe's kernel takes group scales of 1 to {_LARGEST_SCALE} and zeros of 0 to 15")
    if integers.min() < -128 or integers.max() > 127:
        raise ModelError(f"{prefix}: weights between the levels reach {integers.abs().max().item()}, beyond 8 bits")
    products = -(scales.to(torch.int16) * zeros.to(torch.int16))
    return {
        f"{prefix}.qweight": _pack_tiles(weight.codes),
        f"{prefix}.s1_scales": to_storage(weight.row_scales, f"{prefix}.s1_scales"),
        f"{prefix}.s2_scales": _threads_order(scales.T).to(torch.int8),
        f"{prefix}.s2_zeros": _threads_order(products.T).to(torch.uint8).view(torch.int8),
    }


def pack_wide(weight: UniformCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of a linear of 8 bits, named ``<prefix>.weight`` and ``<prefix>.dequant_scale``.

    Raises:
        ModelError: grids that the layout cannot hold, or a scale beyond float16.
    """
    middle = 1 << (WIDE_BITS - 1)
    if weight.bits != WIDE_BITS or weight.scales.shape[1] != 1 or not bool((weight.zeros == middle).all()):
        raise ModelError(f"{prefix}: QServe's layout of 8 bits holds symmetric codes with one scale a row")
    return {
        f"{prefix}.weight": (weight.codes.to(torch.int16) - middle).to(torch.int8),
        f"{prefix}.dequant_scale": to_storage(weight.scales[:, 0], f"{prefix}.dequant_scale"),
    }


def unpack_wide(tensors: Mapping[str, Tensor], prefix: str) -> UniformCodes:
    """The inverse of :func:`pack_wide`, with float32 scales."""
    middle, scales = 1 << (WIDE_BITS - 1), tensors[f"{prefix}.dequant_scale"].float()[:, None]
    codes = (tensors[f"{prefix}.weight"].to(torch.int16) + middle).to(torch.uint8)
    return UniformCodes(codes=codes, scales=scales, zeros=torch.full_like(scales, middle), bits=WIDE_BITS)


def unpack_channel(tensors: Mapping[str, Tensor], prefix: str) -> UniformCodes:
    """The inverse of :func:`pack_channel`, with float32 scales."""
    scales = tensors[f"{prefix}.s1_scales"].float()
    zeros = torch.where(scales > 0, tensors[f"{prefix}.s1_szeros"].float() / scales, 0).round()
    codes = _unpack_tiles(tensors[f"{prefix}.qweight"])
    return UniformCodes(codes=codes, scales=scales[:, None], zeros=zeros[:, None], bits=BITS)


def unpack_group(tensors: Mapping[str, Tensor], prefix: str) -> ProgressiveCodes:
    """The inverse of :func:`pack_group`, with float32 row scales."""
    scales = _rows_order(tensors[f"{prefix}.s2_scales"].view(torch.uint8)).T
    products = -_rows_order(tensors[f"{prefix}.s2_zeros"].to(torch.int16)).T & 0xFF
    return ProgressiveCodes(
        codes=_unpack_tiles(tensors[f"{prefix}.qweight"]),
        row_scales=tensors[f"{prefix}.s1_scales"].float(),
        group_scales=scales.contiguous(),
        zeros=(products // scales.to(torch.int16)).to(torch.uint8).contiguous(),
        bits=BITS,
    )


def repacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In this layout what a calibration has stored, as progressive codes or as one grid a row; all else stays as it is.

    Raises:
        ModelError: as :func:`pack_group`, :func:`pack_channel` and :func:`pack_wide`.
    """
    if linears := progressive.packed_linears(list(tensors)):
        packed = [pack_group(progressive.unpack(tensors, prefix), prefix) for prefix in linears]
        rest = progressive.rest(tensors)
    else:
        unpacked = {prefix: uniform.unpack(tensors, prefix) for prefix in uniform.packed_linears(list(tensors))}
        packed = [
            pack_wide(codes, prefix) if codes.bits == WIDE_BITS else pack_channel(codes, prefix)
            for prefix, codes in unpacked.items()
        ]
        rest = uniform.rest(tensors)
    return {name: tensor for part in (rest, *packed) for name, tensor in part.items()}


def dense_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float32 in which every packed linear has become ``P.weight`` [O, I]."""
    packed = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    wide = [name.removesuffix(".dequant_scale") for name in tensors if name.endswith(".dequant_scale")]
    inside = {f"{prefix}.{part}" for prefix in packed for part in PARTS}
    inside |= {f"{prefix}.{part}" for prefix in wide for part in WIDE_PARTS}
    state = {name: tensor.float() for name, tensor in tensors.items() if name not in inside}
    for prefix in packed:
        unpack = unpack_group if f"{prefix}.s2_scales" in tensors else unpack_channel
        state[f"{prefix}.weight"] = unpack(tensors, prefix).dequantize()
    return state | {f"{prefix}.weight": unpack_wide(tensors, prefix).dequantize() for prefix in wide}


def quantization_config(*, bits: int = BITS, group_size: int, kv_bits: int = 16) -> dict[str, object]:
    """The ``quantization_config`` of config.json: the three keys that SGLang reads, and what else there is to know.

    Args:
        bits: of a weight.
        group_size: 128 for progressive codes; -1 for one grid a row.
        kv_bits: of keys and values in the cache, for which the model was made; the server's own setting decides.
    """
    return {
        "quant_method": QUANT_METHOD,
        "wbits": bits,
        "group_size": group_size,
        "a_bit": ACTIVATION_BITS,
        "kv_bits": kv_bits,
        "s2_order": None if group_size == WHOLE_ROW else list(range(0, _TILE, 8)),
    }


def shape_refusal(shapes: Mapping[str, tuple[int, int]], group_size: int = WHOLE_ROW, bits: int = BITS) -> str | None:
    """Why matrices of these rows and columns, by name, cannot be written in this layout; None where all can.

    The kernels ask for more than the layout: they compute whole blocks of up to 128 outputs and 128 columns, where q, k and v
    are one matrix, and gate and up.
    """
    wide = _TILE if group_size == WHOLE_ROW else GROUP_SIZE
    wrong = [f"{name} [{rows}, {columns}]" for name, (rows, columns) in shapes.items() if rows % _TILE or columns % wide]
    if not wrong or bits == WIDE_BITS:
        return None
    return f"QServe's layout needs rows in multiples of {_TILE} and columns of {wide}, unlike {', '.join(wrong)}."


def _check_sides(prefix: str, codes: Tensor, group_size: int) -> None:
    O, I = codes.shape
    reason = shape_refusal({prefix: (O, I)}, group_size)
    if reason is not None:
        raise ModelError(reason)


def _pack_tiles(codes: Tensor) -> Tensor:
    """Codes [O, I] as int8 [O, I/2]."""
    O, I = codes.shape
    tiles = codes.view(O // _TILE, 2, 2, 8, I // _TILE, 2, 4, 4)  # a, b, m, then c, n, r of the legend
    low, high = tiles.permute(1, 0, 4, 3, 6, 5, 2, 7)
    return (low | high << BITS).reshape(O, I // 2).view(torch.int8)


def _unpack_tiles(stored: Tensor) -> Tensor:
    """The inverse of :func:`_pack_tiles`."""
    O, half = stored.shape
    numbers = stored.contiguous().view(torch.uint8).view(O // _TILE, 2 * half // _TILE, 8, 4, 2, 2, 4)
    tiles = torch.stack((numbers & 15, numbers >> BITS))
    return tiles.permute(1, 0, 6, 3, 2, 5, 4, 7).reshape(O, 2 * half)


def _threads_order(values: Tensor) -> Tensor:
    """Values of the outputs [G, O], every 32 of them from row order into that of the threads."""
    return values.reshape(values.shape[0], -1, 4, 8).transpose(2, 3).reshape(values.shape)


def _rows_order(values: Tensor) -> Tensor:
    """The inverse of :func:`_threads_order`."""
    return values.reshape(values.shape[0], -1, 8, 4).transpose(2, 3).reshape(values.shape)
