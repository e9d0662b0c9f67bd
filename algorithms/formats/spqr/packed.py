"""Our own packed layout of SpQR weights.

No program reads every SpQR setting, so the layout is ours and says everything itself. For a linear ``P`` of shape [O, I] with G
groups a row, columns in sweep order:

``P.codes`` [O, ceil(I*b/32)] int32, a dense bit stream a row. Scales, and in the same way ``zero``: plain ``P.scales`` [O, G]
float16, or two-level ``P.scale_codes`` int32, one stream for all [O, G], with ``P.scale_run_scales`` and ``P.scale_run_zeros``
[R, G] float16. Outliers, where there are any: ``P.outlier_columns`` [n], ``P.outlier_values`` [n] float16, and always
``P.outlier_offsets`` [O + 1] int32. ``P.order`` [I], left out where it is the model's. ``P.shape`` [8] int64: O, I, b, g, then
bits and run of the scales and of the zeros. Columns and order are int16 in two's complement up to 65536 columns, else int32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.formats.own.packed_linear import Layout, load_packed_by
from algorithms.formats.storage import to_storage
from algorithms.numerics.bit_packing import pack_bits, unpack_bits
from algorithms.numerics.sparse_quantized import Outliers, SparseQuantized, Statistics

PLAIN_BITS = 16
_SHORT_COLUMNS = 1 << 16
_COMPONENTS = {
    "codes": ("codes",),
    "scales": ("scales", "scale_codes"),
    "zeros": ("zeros", "zero_codes"),
    "second_level": ("scale_run_scales", "scale_run_zeros", "zero_run_scales", "zero_run_zeros"),
    "outliers": ("outlier_columns", "outlier_values"),
    "row_pointers": ("outlier_offsets",),
    "permutation": ("order",),
    "header": ("shape",),
}
_PARTS = tuple(part for parts in _COMPONENTS.values() for part in parts)


def pack(weight: SparseQuantized, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.codes`` and so on.

    Raises:
        ModelError: a value that float16 cannot hold.
    """
    O, I = weight.codes.shape
    header = [O, I, weight.bits, weight.group_size]
    for statistics in (weight.scales, weight.zeros):
        header += [statistics.bits, statistics.run]
    parts = {
        "codes": pack_bits(weight.codes, weight.bits),
        **_pack_statistics(weight.scales, "scale", prefix),
        **_pack_statistics(weight.zeros, "zero", prefix),
        "outlier_offsets": weight.outliers.offsets.to(torch.int32),
        "shape": torch.tensor(header, dtype=torch.int64),
    }
    if weight.outliers.values.numel():
        parts["outlier_columns"] = _short(weight.outliers.columns, I)
        parts["outlier_values"] = to_storage(weight.outliers.values, f"{prefix}.outlier_values")
    if weight.order is not None:
        parts["order"] = _short(weight.order, I)
    return {f"{prefix}.{part}": tensor for part, tensor in parts.items()}


def unpack(tensors: Mapping[str, Tensor], prefix: str) -> SparseQuantized:
    """The inverse of :func:`pack`."""
    return _unpacked(linear_parts(tensors, prefix))


def _unpacked(parts: Mapping[str, Tensor]) -> SparseQuantized:
    O, I, bits, group_size, *shapes = parts["shape"].tolist()
    order = parts.get("order")
    return SparseQuantized(
        codes=unpack_bits(parts["codes"], bits, I),
        scales=_unpack_statistics(parts, "scale", (O, I // group_size), shapes[:2]),
        zeros=_unpack_statistics(parts, "zero", (O, I // group_size), shapes[2:]),
        outliers=_unpack_outliers(parts, I),
        order=None if order is None else _long(order, I),
        bits=bits,
    )


LAYOUT = Layout(marker="outlier_offsets", parts=_PARTS, decode=lambda parts: _unpacked(parts).dequantize())
linear_parts, packed_linears, dense_state = LAYOUT.of, LAYOUT.packed_linears, LAYOUT.dense_state


def stored_bits(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, int]:
    """The bits that one packed linear takes, by component, padding of words included; together they are all its bits."""
    parts = linear_parts(tensors, prefix)
    sizes = {part: 8 * tensor.numel() * tensor.element_size() for part, tensor in parts.items()}
    return {component: sum(sizes.get(part, 0) for part in names) for component, names in _COMPONENTS.items()}


def quantization_config(*, bits: int, group_size: int, kept_modules: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of config.json, by which readers know that the weights are not plain.

    Args:
        bits: of a code.
        group_size: columns that share a scale.
        kept_modules: linears that stay as they are, by full module name.
    """
    return {
        "quant_method": "bitpress-spqr",
        "bits": bits,
        "group_size": group_size,
        "modules_to_not_convert": list(kept_modules),
    }


def load_packed(folder: Path) -> nn.Module:
    """The model of a folder of packed weights; see :func:`algorithms.formats.own.packed_linear.load_packed_by`."""
    return load_packed_by(LAYOUT, folder)


def _pack_statistics(statistics: Statistics, name: str, prefix: str) -> dict[str, Tensor]:
    if statistics.codes is None:
        return {f"{name}s": to_storage(statistics.decode(), f"{prefix}.{name}s")}
    assert statistics.run_scales is not None
    assert statistics.run_zeros is not None
    return {
        f"{name}_codes": pack_bits(statistics.codes.flatten(), statistics.bits),
        f"{name}_run_scales": to_storage(statistics.run_scales, f"{prefix}.{name}_run_scales"),
        f"{name}_run_zeros": to_storage(statistics.run_zeros, f"{prefix}.{name}_run_zeros"),
    }


def _unpack_statistics(parts: Mapping[str, Tensor], name: str, shape: tuple[int, int], bits_and_run: list[int]) -> Statistics:
    if f"{name}s" in parts:
        return Statistics(values=parts[f"{name}s"].float())
    bits, run = bits_and_run
    return Statistics(
        codes=unpack_bits(parts[f"{name}_codes"], bits, shape[0] * shape[1]).view(shape),
        run_scales=parts[f"{name}_run_scales"].float(),
        run_zeros=parts[f"{name}_run_zeros"].float(),
        bits=bits,
        run=run,
    )


def _unpack_outliers(parts: Mapping[str, Tensor], columns: int) -> Outliers:
    offsets = parts["outlier_offsets"]
    if "outlier_values" not in parts:
        nothing = torch.zeros(0, dtype=torch.int32, device=offsets.device)
        return Outliers(offsets=offsets, columns=nothing, values=nothing.float())
    found = _long(parts["outlier_columns"], columns)
    return Outliers(offsets=offsets, columns=found, values=parts["outlier_values"].float())


def _short(places: Tensor, columns: int) -> Tensor:
    """Places below ``columns`` in the smallest type that the format has for them."""
    return places.to(torch.int32).to(torch.int16) if columns <= _SHORT_COLUMNS else places.to(torch.int32)


def _long(places: Tensor, columns: int) -> Tensor:
    places = places.to(torch.int32)
    return places & 0xFFFF if columns <= _SHORT_COLUMNS else places
