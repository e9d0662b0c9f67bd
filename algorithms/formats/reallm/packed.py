"""Our own packed layout of ReALLM weights.

For a linear ``P`` of shape [O, I] with a low-rank part of rank r:

``P.shape`` [4] int32: O, I, the kind of the residual (its place in KINDS) and the bits of an entry of the low-rank part.
``P.magnitude`` [O] float16, the lengths of the rows. ``P.up`` [O, r] and ``P.down`` [r, I], left out where r is 0: float16 at
16 bits, else streams of codes, with ``P.low_rank_scales`` [r] float16. ``P.residual_*``: what the residual's coding stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.formats.own.packed_linear import Layout, load_packed_by
from algorithms.modeling.source import ModelError
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.numerics.residuals.coder import stored_bits as tensor_bits
from algorithms.numerics.residuals.table import KINDS, coding

_RESIDUALS = (
    "codes", "high_codes", "book", "scale_codes", "run_scales", "run_zeros", "order", "codebooks", "scales", "embedding",
    "decoder", "header",
)  # fmt: skip
_PARTS = ("shape", "magnitude", "up", "down", "low_rank_scales", *(f"residual_{name}" for name in _RESIDUALS))


def pack(weight: LowRankWeight, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.magnitude`` and so on.

    Raises:
        ModelError: a value that float16 cannot hold.
    """
    header = [*weight.shape, KINDS.index(weight.kind), weight.low_rank.bits]
    parts = {"shape": torch.tensor(header, dtype=torch.int32), **weight.tensors()}
    for name, tensor in parts.items():
        assert name in _PARTS, f"the layout has no place for {name}"
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(f"{prefix}: {name} holds a value beyond float16's 65504, in which compressed models are stored")
    return {f"{prefix}.{name}": tensor for name, tensor in parts.items()}


def unpacked(parts: Mapping[str, Tensor]) -> LowRankWeight:
    """The inverse of :func:`pack`, from the parts of one linear."""
    rows, columns, kind, factor_bits = parts["shape"].tolist()
    name = KINDS[kind]
    return LowRankWeight.restore(parts, (rows, columns), kind=name, coding=coding(name), factor_bits=factor_bits)


LAYOUT = Layout(
    marker="magnitude",
    parts=_PARTS,
    decode=lambda parts: unpacked(parts).dequantize(),
    is_slow=lambda parts: "residual_decoder" in parts,  # a forward pass of a network of its own
)


def unpack(tensors: Mapping[str, Tensor], prefix: str) -> LowRankWeight:
    """The weight of one linear among a block's tensors."""
    return unpacked(LAYOUT.of(tensors, prefix))


def stored_bits(weight: LowRankWeight) -> Mapping[str, int]:
    """The bits that one packed linear takes, by component; together they are all its bits."""
    return {**weight.bits(), "header": tensor_bits(pack(weight, "")[".shape"])}


def quantization_config(*, kind: str, kept_modules: tuple[str, ...]) -> dict[str, object]:
    """The ``quantization_config`` of config.json, by which readers know that the weights are not plain.

    Args:
        kind: of the residuals.
        kept_modules: linears that stay as they are, by full module name.
    """
    return {"quant_method": "bitpress-reallm", "residual": kind, "modules_to_not_convert": list(kept_modules)}


def load_packed(folder: Path) -> nn.Module:
    """The model of a folder of packed weights; see :func:`algorithms.formats.own.packed_linear.load_packed_by`."""
    return load_packed_by(LAYOUT, folder)
