"""The layouts of AWQ in its three versions, as AutoAWQ, vLLM and gptqmodel read them: 4-bit codes with whole zeros.

Legend: O out_features, I in_features, G groups a row, g columns a group. For a linear ``P``:

``gemm``: ``P.qweight`` [I, O/8] int32, ``P.qzeros`` [G, O/8] int32, ``P.scales`` [G, O] float16. A word holds 8 neighbouring
outputs, in its nibbles from the lowest 0, 2, 4, 6, 1, 3, 5, 7.

``gemv``: ``P.qweight`` [O, I/8] int32, ``P.qzeros`` [O, z] int32, ``P.scales`` [O, 8z] float16. A word holds 8 neighbouring
columns, or zeros of 8 neighbouring groups, in their order. Groups are filled up with zeros: see :func:`_padded_groups`.

``gemv_fast``: ``P.qweight`` [O/4, I] int16, ``P.scales`` and ``P.qzeros`` [8z, O] float16, the second -scale * zero. Columns
are shuffled in runs of 32, rows interleaved by fours in runs of 64 columns: see :func:`_shuffled`. Its kernel adds the products
as float16 has rounded them, so what it computes is off by up to 2^-11 of scale * zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.formats.storage import to_storage
from algorithms.modeling.source import ModelError
from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.uniform import UniformCodes

BITS = 4
GROUP_SIZES = (32, 64, 128)
_NIBBLES = 8  # codes in a 32-bit word
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 codes lies in each nibble, the lowest first
# What rows and columns must be multiples of. Rows of gemv and gemv_fast could be fewer, but AutoAWQ's modules refuse them.
_STRIDES = {"gemm": (8, 1), "gemv": (8, 8), "gemv_fast": (8, 64)}
VERSIONS = tuple(_STRIDES)


def pack(weight: UniformCodes, prefix: str, *, version: str = "gemm") -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.qweight`` and so on.

    Args:
        weight: 4 bits, groups of neighbouring columns, whole zeros.
        prefix: the linear's name.
        version: ``gemm``, ``gemv`` or ``gemv_fast``.

    Raises:
        ModelError: sides, groups or zeros that the layout cannot hold, or a scale beyond float16.
    """
    _check(weight, prefix, version)
    scales, zeros = to_storage(weight.scales, f"{prefix}.scales"), weight.zeros.to(torch.uint8)
    if version == "gemm":
        packed = (_interleaved(weight.codes.T), _interleaved(zeros.T), scales.T)
    else:
        spare = _padded_groups(zeros.shape[1], weight.group_size) - zeros.shape[1]
        wide_scales, wide_zeros = F.pad(scales, (0, spare)), F.pad(zeros, (0, spare))
        if version == "gemv":
            packed = (pack_bits(weight.codes, BITS), pack_bits(wide_zeros, BITS), wide_scales)
        else:
            products = to_storage(-wide_scales.float() * wide_zeros.float(), f"{prefix}.qzeros")
            packed = (_shuffled(weight.codes), products.T, wide_scales.T)
    names = ("qweight", "qzeros", "scales")
    return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in zip(names, packed, strict=True)}


def unpack(tensors: Mapping[str, Tensor], prefix: str, group_size: int, *, version: str = "gemm") -> UniformCodes:
    """The inverse of :func:`pack`, with float32 scales; groups are ``group_size`` columns."""
    qweight, qzeros, scales = (tensors[f"{prefix}.{name}"] for name in ("qweight", "qzeros", "scales"))
    if version == "gemm":
        O = scales.shape[1]
        codes, zeros, scales = _deinterleaved(qweight, O).T, _deinterleaved(qzeros, O).T, scales.T
    elif version == "gemv":
        codes = unpack_bits(qweight, BITS, qweight.shape[1] * _NIBBLES)
        zeros = unpack_bits(qzeros, BITS, scales.shape[1])
    else:
        codes, scales = _unshuffled(qweight), scales.T
        zeros = torch.where(scales > 0, -qzeros.T.float() / scales.float(), 0).round()
    G = codes.shape[1] // group_size
    return UniformCodes(
        codes=codes.contiguous(),
        scales=scales[:, :G].float().contiguous(),
        zeros=zeros[:, :G].float().contiguous(),
        bits=BITS,
    )


def quantization_config(
    *, bits: int, group_size: int, zero_point: bool = True, version: str = "gemm", kept_modules: Sequence[str]
) -> dict[str, object]:
    """The ``quantization_config`` of config.json.

    Args:
        bits: 4.
        group_size: columns that share a scale.
        zero_point: whether ``qzeros`` are there, as :func:`pack` writes them for symmetric grids too.
        version: as in :func:`pack`.
        kept_modules: linears that stay as they are, by full module name; readers keep lm_head unasked.
    """
    others = [name for name in kept_modules if name != "lm_head"]
    return {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group_size,
        "zero_point": zero_point,
        "version": version,
        "modules_to_not_convert": others or None,
    }


def refusal(*, bits: int, symmetric: bool, group_size: int, has_column_groups: bool) -> str | None:
    """Why weights of these settings cannot be written in this layout, in a sentence; None where they can.

    Args:
        bits: of a code.
        symmetric: every zero is 2^(bits - 1), which is written like any other zero.
        group_size: columns that share a scale; -1 stands for the whole row.
        has_column_groups: the columns of a group are not neighbours.
    """
    if bits != BITS:
        return f"AWQ's readers know codes of 4 bits alone, and wbits is {bits}."
    if group_size not in GROUP_SIZES:
        whole = ", the whole row, for which their kernels have no place" if group_size == -1 else ""
        return f"AWQ's readers share groups of 32, 64 or 128 columns, and groupsize is {group_size}{whole}."
    if has_column_groups:
        return (
            "AWQ has groups of neighbouring columns only, which act_order: true with groupsize "
            f"{group_size} gives with static_groups: true."
        )
    return None


def shape_refusal(shapes: Mapping[str, tuple[int, int]], version: str = "gemm") -> str | None:
    """Why matrices of these rows and columns, by name, cannot be written in this layout; None where all can.

    The CUDA kernels ask for more than the layout: those of ``gemm`` for rows in multiples of 64 and of the group size, where
    vLLM does not take its Marlin or Triton kernels instead.
    """
    high, wide = _STRIDES[version]
    wrong = [f"{name} [{rows}, {columns}]" for name, (rows, columns) in shapes.items() if rows % high or columns % wide]
    if not wrong:
        return None
    sides = f"rows in multiples of {high}" + (f" and columns in multiples of {wide}" if wide > 1 else "")
    return f"AWQ's layout {version} needs {sides}, unlike {', '.join(wrong)}."


def _check(weight: UniformCodes, prefix: str, version: str) -> None:
    O, I = weight.codes.shape
    reason = shape_refusal({prefix: (O, I)}, version)
    if reason is not None:
        raise ModelError(reason)
    if weight.bits != BITS or weight.groups is not None:
        raise ModelError(f"{prefix}: AWQ holds codes of 4 bits in groups of neighbouring columns")
    zeros = weight.zeros
    if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < 1 << BITS)).all()):
        raise ModelError(f"{prefix} has zeros off the grid 0 .. 15, which AWQ's layouts cannot hold")


def _padded_groups(groups: int, group_size: int) -> int:
    """Groups a row that ``gemv`` and ``gemv_fast`` store, 8z: whole words, in threads' strides of 2 or 4 for small groups."""
    stride = {32: 4, 64: 2}.get(group_size, 1) * _NIBBLES
    return -(-groups // stride) * stride


def _interleaved(codes: Tensor) -> Tensor:
    """Codes [..., n] in words [..., n/8] with the nibbles in ``_ORDER``."""
    runs = codes.reshape(*codes.shape[:-1], -1, _NIBBLES)
    return pack_bits(runs[..., _ORDER].flatten(-2), BITS)


def _deinterleaved(words: Tensor, count: int) -> Tensor:
    """The inverse of :func:`_interleaved`."""
    runs = unpack_bits(words, BITS, count).unflatten(-1, (-1, _NIBBLES))
    return runs[..., _inverse_order()].flatten(-2)


def _shuffled(codes: Tensor) -> Tensor:
    """Codes [O, I] as int16 [O/4, I] of ``gemv_fast``.

    In every run of 32 columns, the pairs of columns that lie 8 apart come together; the 8 columns of four such pairs then go
    into ``_ORDER``; and the runs of 64 columns of 4 rows follow one another, four codes in a number.
    """
    O, I = codes.shape
    columns = codes.reshape(O, I // 32, 4, 4, 2).transpose(2, 3).reshape(O, I // _NIBBLES, _NIBBLES)[..., _ORDER]
    rows = columns.reshape(O // 4, 4, I // 64, 64).transpose(1, 2).reshape(O // 4, I * 4)
    return pack_bits(rows, BITS).view(torch.int16)


def _unshuffled(numbers: Tensor) -> Tensor:
    """The inverse of :func:`_shuffled`."""
    quarter, I = numbers.shape
    rows = unpack_bits(numbers.contiguous().view(torch.int32), BITS, I * 4)
    columns = rows.view(quarter, I // 64, 4, 64).transpose(1, 2).reshape(quarter * 4, I // _NIBBLES, _NIBBLES)
    return columns[..., _inverse_order()].view(quarter * 4, I // 32, 4, 4, 2).transpose(2, 3).reshape(quarter * 4, I)


def _inverse_order() -> list[int]:
    return [_ORDER.index(place) for place in range(_NIBBLES)]
