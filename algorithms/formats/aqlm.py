"""The Hugging Face layout of AQLM checkpoints, as transformers with the ``aqlm`` package reads it.

For a linear ``P`` of shape [O, I], with no = O/og, ni = I/ig, M codebooks of K = 2^B codewords: ``P.codes`` [no, ni, M] in
the smallest signed integer of at least B bits (value v >= 2^(B-1) stored as v - 2^B), ``P.codebooks`` [M, K, og, ig] float16,
``P.scales`` [no, 1, 1, 1] float16, ``P.bias`` [O] float16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from algorithms.formats.storage import to_storage
from algorithms.numerics.codebooks.additive import AdditiveCodes


def pack(weight: AdditiveCodes, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.codes`` and so on.

    Raises:
        ModelError: a codebook or scale that float16 cannot hold.
    """
    bits = bits_per_codebook(weight)
    container = torch.int8 if bits <= 8 else torch.int16
    signed = torch.where(weight.codes >= 1 << (bits - 1), weight.codes - (1 << bits), weight.codes)
    return {
        f"{prefix}.codes": signed.to(container),
        f"{prefix}.codebooks": to_storage(weight.codebooks, f"{prefix}.codebooks"),
        f"{prefix}.scales": to_storage(weight.scales.view(-1, 1, 1, 1), f"{prefix}.scales"),
    }


def unpack(tensors: Mapping[str, Tensor], prefix: str) -> AdditiveCodes:
    """The inverse of :func:`pack`, with float32 codebooks and scales."""
    codebooks = tensors[f"{prefix}.codebooks"].float()
    return AdditiveCodes(
        codes=tensors[f"{prefix}.codes"].long() % codebooks.shape[1],
        codebooks=codebooks,
        scales=tensors[f"{prefix}.scales"].float().flatten(),
    )


def bits_per_codebook(weight: AdditiveCodes) -> int:
    """B, for codebooks of 2^B codewords."""
    return weight.codebooks.shape[1].bit_length() - 1


def packed_linears(names: Sequence[str]) -> list[str]:
    """The linears ``P`` whose ``P.codes`` is among the names, sorted."""
    return sorted(name.removesuffix(".codes") for name in names if name.endswith(".codes"))


def dense_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float32 in which every packed linear has become ``P.weight`` [O, I]."""
    packed = packed_linears(list(tensors))
    inside = {f"{prefix}.{part}" for prefix in packed for part in ("codes", "codebooks", "scales")}
    state = {name: tensor.float() for name, tensor in tensors.items() if name not in inside}
    for prefix in packed:
        state[f"{prefix}.weight"] = unpack(tensors, prefix).dequantize()
    return state


def quantization_config(
    *, num_codebooks: int, bits: int, group_shape: tuple[int, int], kept_modules: Sequence[str]
) -> dict[str, object]:
    """The ``quantization_config`` of config.json.

    ``kept_modules`` are the linears that stay as they are, by full module name. Each is written in two spellings:
    transformers 4 looks for the weight's name, transformers 5 matches the module's name, and a head that only the first
    protects is silently replaced by an uninitialised layer.
    """
    kept = [spelling for name in kept_modules for spelling in (name, f"{name}.weight")]
    return {
        "quant_method": "aqlm",
        "nbits_per_codebook": bits,
        "num_codebooks": num_codebooks,
        "out_group_size": group_shape[0],
        "in_group_size": group_shape[1],
        "linear_weights_not_to_quantize": kept,
    }
