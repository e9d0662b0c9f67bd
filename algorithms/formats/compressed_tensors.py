"""The ``pack-quantized`` layout of compressed-tensors, as transformers and vLLM read it.

For a linear ``P`` of shape [O, I] with codes of b bits and G groups of g columns: ``P.weight_packed`` [O, ceil(I*b/32)] int32,
a dense bit stream of the codes; ``P.weight_scale`` [O, G] float16; ``P.weight_shape`` [2] int64. Symmetric only: the zero
is 2^(b-1) everywhere and is not stored. A scale for the whole row is the client's strategy "channel".

Activations may be rounded as well, to b bits, symmetric, with a scale for each token that is found while the model runs: the
client divides by s = max |x| / ((2^b - 1) / 2), for 8 bits max |x| / 127.5, in the type of x, clamps to the codes of b bits,
rounds half to even and multiplies by s. It tells tokens apart in inputs [batch, tokens, channels] only; inputs of two
dimensions get one scale for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from algorithms.formats.storage import WHOLE_ROW, to_storage
from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.uniform import UniformCodes

BITS = range(2, 9)


def pack(weight: UniformCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.weight_packed`` and so on.

    Raises:
        ModelError: a scale that float16 cannot hold.
    """
    return {
        f"{prefix}.weight_packed": pack_bits(weight.codes, weight.bits),
        f"{prefix}.weight_scale": to_storage(weight.scales, f"{prefix}.weight_scale"),
        f"{prefix}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], prefix: str, bits: int) -> UniformCodes:
    """The inverse of :func:`pack`, with float32 scales."""
    columns = int(tensors[f"{prefix}.weight_shape"][1])
    scales = tensors[f"{prefix}.weight_scale"].float()
    return UniformCodes(
        codes=unpack_bits(tensors[f"{prefix}.weight_packed"], bits, columns),
        scales=scales,
        zeros=torch.full_like(scales, 1 << (bits - 1)),
        bits=bits,
    )


def quantization_config(
    *, bits: int, group_size: int, kept_modules: Sequence[str], activation_bits: int | None = None
) -> dict[str, object]:
    """The ``quantization_config`` of config.json.

    Args:
        bits: 2 to 8.
        group_size: columns that share a scale; -1 stands for the whole row.
        kept_modules: linears that stay as they are, by full module name, for instance ``lm_head``.
        activation_bits: to which the client rounds the inputs of the linears, token by token; None leaves them as they are.
    """
    grouping = {"strategy": "channel"} if group_size == WHOLE_ROW else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **grouping}
    group: dict[str, object] = {"targets": ["Linear"], "weights": weights}
    if activation_bits is not None:
        tokens = {"num_bits": activation_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group |= {"input_activations": tokens, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(kept_modules),
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
    }


def class_refusal(linears: Mapping[str, nn.Linear]) -> str | None:
    """Why linears of a class of their own, by name, cannot be written for transformers; None where there is none such."""
    strange = {name: type(linear).__name__ for name, linear in linears.items() if type(linear) is not nn.Linear}
    if not strange:
        return None
    name, kind = next(iter(strange.items()))
    return f"transformers loads packed weights into nn.Linear alone, and {name} is a {kind}."


def refusal(*, bits: int, symmetric: bool, group_size: int, has_column_groups: bool) -> str | None:
    """Why weights of these settings cannot be written in this layout, in a sentence; None where they can.

    Args:
        bits: of a code.
        symmetric: every zero is 2^(bits - 1).
        group_size: columns that share a scale; -1 stands for the whole row.
        has_column_groups: the columns of a group are not neighbours.
    """
    if bits not in BITS:
        return f"compressed-tensors packs codes of 2 to 8 bits, and wbits is {bits}."
    if not symmetric:
        return (
            "compressed-tensors 0.18 and later does not load packed weights with zero points in transformers; set sym: true, "
            "or export gptq."
        )
    if has_column_groups:
        return (
            "compressed-tensors needs groups of neighbouring columns, which act_order: true with groupsize "
            f"{group_size} gives only with static_groups: true."
        )
    return None
