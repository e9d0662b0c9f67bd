"""The GPTQ layout, as gptqmodel and vLLM read it, and auto-round's container around it.

For a linear ``P`` of shape [O, I] with codes of b bits and G groups: ``P.qweight`` [I*b/32, O] int32, the codes of each output
as a dense bit stream along the inputs (32 codes of 3 bits fill 3 words); ``P.qzeros`` [G, O*b/32] int32, the zeros as such a
stream along the outputs; ``P.scales`` [G, O] float16; ``P.g_idx`` [I] int32, the group of each column.

``qzeros`` hold zero - 1 modulo 2^b in the first version of the format (``gptq``), the zero itself in the second (``gptq_v2``).
A zero of 0 therefore wraps in the first version, and its clients disagree on what it is: see :func:`wraps`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from algorithms.formats.storage import column_groups, to_storage
from algorithms.modeling.source import ModelError
from algorithms.numerics.bit_packing import WORD, pack_bits, unpack_bits
from algorithms.numerics.uniform import UniformCodes

BITS = (2, 3, 4, 8)
FIRST_VERSION, SECOND_VERSION = 1, 0  # what is subtracted from a zero before it is stored


def pack(weight: UniformCodes, prefix: str, *, zero_offset: int = FIRST_VERSION) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.qweight`` and so on.

    Args:
        weight: whole zeros, sides that are multiples of 32.
        prefix: the linear's name.
        zero_offset: subtracted from the zeros: 1 for checkpoint format ``gptq``, 0 for ``gptq_v2``.

    Raises:
        ModelError: sides or zeros that the format cannot hold, or a scale beyond float16.
    """
    O, I = weight.codes.shape
    if O % WORD or I % WORD:
        raise ModelError(f"{prefix} is {O} by {I}; the GPTQ format needs sides that are multiples of {WORD}")
    if not _whole(weight):
        raise ModelError(f"{prefix} has zeros off the grid 0 .. {(1 << weight.bits) - 1}, which the GPTQ format cannot hold")
    zeros = (weight.zeros.to(torch.int16) - zero_offset) & ((1 << weight.bits) - 1)
    groups = column_groups(weight.groups, I, weight.scales.shape[1])
    return {
        f"{prefix}.qweight": pack_bits(weight.codes, weight.bits).T.contiguous(),
        f"{prefix}.qzeros": pack_bits(zeros.T.to(torch.uint8), weight.bits),
        f"{prefix}.scales": to_storage(weight.scales.T, f"{prefix}.scales").contiguous(),
        f"{prefix}.g_idx": groups,
    }


def unpack(tensors: Mapping[str, Tensor], prefix: str, bits: int, *, zero_offset: int = FIRST_VERSION) -> UniformCodes:
    """The inverse of :func:`pack`, with float32 scales; groups of neighbouring columns are left unnamed."""
    scales = tensors[f"{prefix}.scales"].T.float().contiguous()
    O, G = scales.shape
    groups = tensors[f"{prefix}.g_idx"]
    I = groups.numel()
    stored = unpack_bits(tensors[f"{prefix}.qzeros"], bits, O).T.to(torch.int16)
    neighbours = torch.equal(groups.cpu(), column_groups(None, I, G))
    return UniformCodes(
        codes=unpack_bits(tensors[f"{prefix}.qweight"].T, bits, I),
        scales=scales,
        zeros=((stored + zero_offset) & ((1 << bits) - 1)).float().contiguous(),
        bits=bits,
        groups=None if neighbours else groups,
    )


def wraps(weight: UniformCodes) -> bool:
    """Whether a zero is 0, which the first version of the format stores as 2^bits - 1.

    We read it as 0. Other readers do not: auto-round adds 1 to the stored number and gets 2^bits, which shifts a whole group;
    gptqmodel adds 1 to all numbers of a word at once, so that the carry falls into the next output's zero. The second version
    holds it as it is.
    """
    return bool((weight.zeros == 0).any())


def quantization_config(
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    column_groups: bool,
    kept_modules: Sequence[str],
    zero_offset: int = FIRST_VERSION,
) -> dict[str, object]:
    """The ``quantization_config`` of config.json for gptqmodel and vLLM.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; -1 stands for the whole row.
        symmetric: every zero is 2^(bits - 1).
        column_groups: the columns of a group are not neighbours, the clients' ``desc_act``.
        kept_modules: linears that stay as they are, by full module name.
        zero_offset: as in :func:`pack`.
    """
    config: dict[str, object] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if zero_offset == FIRST_VERSION else "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": column_groups,
        "sym": symmetric,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    others = [name for name in kept_modules if name != "lm_head"]
    if others:
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in others}
    return config


def refusal(*, bits: int, symmetric: bool, group_size: int, has_column_groups: bool) -> str | None:
    """Why weights of these settings cannot be written in this layout, in a sentence; None where they can.

    Args:
        bits: of a code.
        symmetric: every zero is 2^(bits - 1); other zeros can be written too, as long as they are whole numbers.
        group_size: columns that share a scale; -1 stands for the whole row.
        has_column_groups: the columns of a group are not neighbours; ``g_idx`` names their groups.
    """
    if bits not in BITS:
        return f"GPTQ's clients read codes of 2, 3, 4 or 8 bits, and wbits is {bits}."
    return None


def shape_refusal(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why matrices of these rows and columns, by name, cannot be written in this layout; None where all can."""
    wrong = [f"{name} [{rows}, {columns}]" for name, (rows, columns) in shapes.items() if rows % WORD or columns % WORD]
    return f"GPTQ's layout needs rows and columns in multiples of {WORD}, unlike {', '.join(wrong)}." if wrong else None


def auto_round_zero_offset(symmetric: bool) -> int:
    """The ``zero_offset`` with which tensors go into auto-round's container."""
    return FIRST_VERSION if symmetric else SECOND_VERSION


def auto_round_config(*, bits: int, group_size: int, symmetric: bool, kept_modules: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of config.json for transformers with the ``auto-round`` package.

    Its CPU kernel takes the first version of the layout for symmetric codes only, and the second, which it calls
    ``auto_round``, for all; see :func:`auto_round_zero_offset`. Arguments as in :func:`quantization_config`.
    """
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "data_type": "int",
        "extra_config": {name: {"bits": 16, "data_type": "fp"} for name in kept_modules},
    }


def auto_round_refusal(*, bits: int, symmetric: bool, group_size: int, has_column_groups: bool) -> str | None:
    """As :func:`refusal`, for auto-round's container, whose clients ignore ``g_idx``."""
    if has_column_groups:
        return (
            "auto-round reads groups of neighbouring columns only, which act_order: true with groupsize "
            f"{group_size} gives with static_groups: true."
        )
    return refusal(bits=bits, symmetric=symmetric, group_size=group_size, has_column_groups=has_column_groups)


def _whole(weight: UniformCodes) -> bool:
    zeros = weight.zeros
    return bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros < 1 << weight.bits)).all())
