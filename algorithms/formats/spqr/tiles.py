"""SpQR's 3-bit layout of 16 by 16 tiles, for the CUDA kernel of the ``spqr_quant`` package.

For a linear ``P`` of shape [O, I], columns in sweep order, T = ceil(O/16) tile rows of I/16 tiles:
``P.dense_weights`` [T * I/16 * 16] int64, one word a tile's row (tile rows outermost, rows of a tile innermost): bits 0-2 scale
code, 3-5 zero code, 6-53 sixteen weight codes, 54-61 byte k//2 of the tile's second-order word (k: the row in the tile).
That word is four float16 numbers, lowest first: run scale of the scales, of the zeros, run zero of the scales, of the zeros.
``P.row_offsets`` [O + 1] int32 and ``P.col_vals`` [n] int32 (float16 bits << 16 | column) are the outliers by row;
``P.in_perm`` [I/2] int32 is the sweep order, two unsigned 16-bit places a word.

The kernel adds an outlier to the dense part, so what is stored is the outlier less what the code at its place decodes to,
rounded to float16. Rows that pad the last tile have no codes and keep their byte: without it, the kernel, which gathers the
second-order word from all 16 rows, would read a truncated one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.formats.storage import to_storage
from algorithms.modeling.source import ModelError
from algorithms.numerics.sparse_quantized import Outliers, SparseQuantized, Statistics

BITS, TILE = 3, 16
_MASK = (1 << BITS) - 1
_CODES_AT, _BYTE_AT = 2 * BITS, (TILE + 2) * BITS
_COLUMNS = 1 << 16


def pack(weight: SparseQuantized, prefix: str) -> dict[str, Tensor]:
    """The tensors of one linear, named ``<prefix>.dense_weights`` and so on.

    Raises:
        ModelError: bits, groups or statistics other than the tiles', too many columns, or values beyond float16.
    """
    _check(weight, prefix)
    I = weight.codes.shape[1]
    order = torch.arange(I) if weight.order is None else weight.order
    pairs = order.to(torch.int64).cpu().view(-1, 2)
    return {
        f"{prefix}.dense_weights": _words(weight, prefix).flatten(),
        f"{prefix}.row_offsets": weight.outliers.offsets.to(torch.int32),
        f"{prefix}.col_vals": _column_values(weight, prefix),
        f"{prefix}.in_perm": _signed32(pairs[:, 1] << 16 | pairs[:, 0]),
    }


def unpack(tensors: Mapping[str, Tensor], prefix: str, shape: tuple[int, int]) -> SparseQuantized:
    """The inverse of :func:`pack`, but for the rounding of an outlier's distance from the dense part.

    Args:
        tensors: as :func:`pack` names them.
        prefix: the linear's name.
        shape: its O and I, which the layout does not hold.
    """
    O, I = shape
    words = tensors[f"{prefix}.dense_weights"].view(-1, I // TILE, TILE)
    places = torch.arange(TILE, device=words.device) * BITS + _CODES_AT
    codes = (words[..., None] >> places & _MASK).transpose(1, 2).reshape(-1, I)[:O]
    halves = (words >> _BYTE_AT & 0xFF).to(torch.uint8)[..., ::2].contiguous().flatten().view(torch.float16)
    run_scales, zero_scales, run_zeros, zero_zeros = halves.float().view(*words.shape[:2], 4).unbind(-1)
    order = tensors[f"{prefix}.in_perm"].to(torch.int64)
    order = torch.stack([order & 0xFFFF, order >> 16 & 0xFFFF], dim=1).flatten().to(torch.int32)
    dense = SparseQuantized(
        codes=codes.to(torch.uint8),
        scales=_statistics(words & _MASK, run_scales, run_zeros, O),
        zeros=_statistics(words >> BITS & _MASK, zero_scales, zero_zeros, O),
        outliers=_no_outliers(O, words.device),
        order=None if torch.equal(order.cpu(), torch.arange(I, dtype=torch.int32)) else order,
        bits=BITS,
    )
    return _with_outliers(dense, tensors[f"{prefix}.row_offsets"], tensors[f"{prefix}.col_vals"])


def quantization_config(*, tensors: Mapping[str, Tensor], kept_modules: Sequence[str]) -> dict[str, object]:
    """The ``quantization_config`` of config.json.

    Args:
        tensors: those of all packed linears, or tensors on the meta device of their shapes.
        kept_modules: linears that stay as they are, by full module name.
    """
    return {
        "quant_method": "spqr",
        "bits": BITS,
        "beta1": TILE,
        "beta2": TILE,
        "modules_to_not_convert": list(kept_modules),
        "shapes": {f"{name}.shape": tensor.numel() for name, tensor in tensors.items()},
    }


def refusal(
    *,
    bits: int,
    symmetric: bool,
    group_size: int,
    has_column_groups: bool,
    scale_bits: int = BITS,
    zero_bits: int = BITS,
    run: int = TILE,
) -> str | None:
    """Why weights of these settings cannot be written in this layout, in a sentence; None where they can.

    Args:
        bits: of a code.
        symmetric: zeros that are not stored; a tile always stores them.
        group_size: columns that share a scale.
        has_column_groups: never in the way: columns stand in sweep order.
        scale_bits: of a scale's code; 16 where scales are plain.
        zero_bits: of a zero's code; 16 where zeros are plain.
        run: output rows that share the second level.
    """
    wanted = [
        ("wbits", bits, BITS),
        ("groupsize", group_size, TILE),
        ("qq_scale_bits", scale_bits, BITS),
        ("qq_zero_bits", zero_bits, BITS),
        ("qq_groupsize", run, TILE),
    ]
    others = [f"{key}: {need} (it is {value})" for key, value, need in wanted if value != need]
    others += ["sym: false"] if symmetric else []
    return f"SpQR's kernel has one tile; it needs {', '.join(others)}." if others else None


def _check(weight: SparseQuantized, prefix: str) -> None:
    O, I = weight.codes.shape
    reason = refusal(
        bits=weight.bits,
        symmetric=False,
        group_size=weight.group_size,
        has_column_groups=False,
        scale_bits=weight.scales.bits,
        zero_bits=weight.zeros.bits,
        run=weight.scales.run if weight.scales.run == weight.zeros.run else 0,
    )
    if reason is None and I > _COLUMNS:
        reason = f"SpQR's kernel knows at most {_COLUMNS} columns, not {I}."
    if reason is not None:
        raise ModelError(f"{prefix} ({O} by {I}): {reason}")


def _words(weight: SparseQuantized, prefix: str) -> Tensor:
    """The words [T, I/16, 16] int64."""
    O, I = weight.codes.shape
    padding = -O % TILE
    places = torch.arange(TILE, device=weight.codes.device) * BITS + _CODES_AT
    codes = F.pad(weight.codes, (0, 0, 0, padding)).view(-1, TILE, I // TILE, TILE)
    words = (codes.to(torch.int64) << places).sum(-1)
    second = []
    for place, statistics in enumerate((weight.scales, weight.zeros)):
        assert statistics.codes is not None
        assert statistics.run_scales is not None
        assert statistics.run_zeros is not None
        words |= F.pad(statistics.codes, (0, 0, 0, padding)).view(words.shape).to(torch.int64) << place * BITS
        second.append([to_storage(runs, prefix) for runs in (statistics.run_scales, statistics.run_zeros)])
    halves = torch.stack([second[0][0], second[1][0], second[0][1], second[1][1]], dim=-1)
    octets = halves.flatten().view(torch.uint8).view(*halves.shape[:2], 8).repeat_interleave(2, -1)
    return (words | octets.transpose(1, 2).to(torch.int64) << _BYTE_AT).transpose(1, 2)


def _column_values(weight: SparseQuantized, prefix: str) -> Tensor:
    columns = weight.outliers.columns.to(torch.int64)
    distance = weight.outliers.values - _dense(weight)[weight.outliers.rows, columns]
    return _signed32(to_storage(distance, f"{prefix}.col_vals").view(torch.int16).to(torch.int64) << 16 | columns)


def _with_outliers(dense: SparseQuantized, offsets: Tensor, column_values: Tensor) -> SparseQuantized:
    columns = (column_values.to(torch.int64) & 0xFFFF).to(torch.int32)
    distance = (column_values >> 16).to(torch.int16).view(torch.float16).float()
    empty = Outliers(offsets=offsets, columns=columns, values=distance)
    values = (_dense(dense)[empty.rows, columns.long()] + distance).half().float()
    return SparseQuantized(
        codes=dense.codes,
        scales=dense.scales,
        zeros=dense.zeros,
        outliers=Outliers(offsets=offsets, columns=columns, values=values),
        order=dense.order,
        bits=BITS,
    )


def _dense(weight: SparseQuantized) -> Tensor:
    """What the codes alone decode to, [O, I] in sweep order."""
    O, I = weight.codes.shape
    tiles = weight.codes.view(O, -1, TILE).float() - weight.zeros.decode()[:, :, None]
    return (tiles * weight.scales.decode()[:, :, None]).view(O, I)


def _statistics(codes: Tensor, run_scales: Tensor, run_zeros: Tensor, rows: int) -> Statistics:
    by_row = codes.transpose(1, 2).reshape(-1, codes.shape[1])[:rows].to(torch.uint8)
    return Statistics(codes=by_row, run_scales=run_scales, run_zeros=run_zeros, bits=BITS, run=TILE)


def _no_outliers(rows: int, device: torch.device) -> Outliers:
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    return Outliers(offsets=offsets, columns=nothing, values=nothing.float())


def _signed32(numbers: Tensor) -> Tensor:
    """Numbers of up to 32 bits in int64, as the int32 of the same bits."""
    return (((numbers + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)).to(torch.int32)
