"""Bits that matrices of given shapes will take, before anything is fitted: all that is stored follows from sizes.

Legend: O out_features, I in_features, b weights a code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from algorithms.base import StageError
from algorithms.blockwise.pipeline import linear_shapes
from algorithms.modeling.source import ModelSource
from algorithms.numerics.bit_packing import WORD, packed_words
from algorithms.numerics.low_rank.factors import HALF, LowRank
from algorithms.numerics.residuals.aqlm import num_codebooks
from algorithms.numerics.residuals.vector_codes import BLOCK_ROWS, scales_size
from algorithms.quantization.reallm.config import AQLM, NERV, NF, ReallmConfig
from algorithms.quantization.reallm.shapes import Shape, uniform_shape
from algorithms.quantization.reallm.survey.curves import surveyed

logger = logging.getLogger(__name__)

_HEADER = 4 * 32
_BYTE = 8
_TILE_COLUMNS = 64  # of nf, and of vq where columns are permuted
_MUCH = 8.0  # bits a weight, as many as plain rounding to bytes takes


def stored_size(matrix: tuple[int, int], shape: Shape, config: ReallmConfig) -> dict[str, int]:
    """Bits by component of a packed linear of O x I; a neural decoder's are at most those it is given."""
    low_rank = LowRank.stored_size(matrix, min(shape.rank, *matrix), config.low_rank_bits)
    return {**_coded(matrix, shape, config), "low_rank": low_rank, "magnitudes": HALF * matrix[0], "header": _HEADER}


def check_sizes(config: ReallmConfig, source: ModelSource) -> None:
    """Refuse a budget that no choice of shapes meets, and warn of shapes that are too much for small matrices.

    Raises:
        StageError: ``target_bits`` is out of reach.
    """
    matrices = list(linear_shapes(source).values())
    weights = sum(rows * columns for rows, columns in matrices)
    if config.target_bits is not None:
        if config.residual != NERV:
            refuse_out_of_reach(config.target_bits, *(bits / weights for bits in _reach(matrices, config)))
        return
    totals: dict[str, float] = {}
    for matrix in matrices:
        for name, bits in stored_size(matrix, uniform_shape(config), config).items():
            totals[name] = totals.get(name, 0.0) + bits / weights
    if sum(totals.values()) > _MUCH:
        parts = ", ".join(f"{name} {bits:.1f}" for name, bits in totals.items() if bits >= 0.05)
        logger.warning(
            "llm.ReALLM: %.1f bits a weight (%s): this model's matrices are small; lower rank, num_bits or bucket",
            sum(totals.values()),
            parts,
        )


def refuse_out_of_reach(target: float, least: float, most: float) -> None:
    """Bits a weight have to lie between the least and the most that there are.

    Raises:
        StageError: they do not.
    """
    if not least <= target <= most:
        raise StageError(
            f"llm.ReALLM.target_bits: {target:g} is out of reach; this model takes {least:.2f} to {most:.2f} bits."
        )


def _reach(matrices: list[tuple[int, int]], config: ReallmConfig) -> tuple[int, int]:
    """The least and the most bits of one block, by what a survey tries."""
    least = most = 0
    for matrix in matrices:
        codes, ranks = surveyed(matrix, config)
        sizes = [
            sum(stored_size(matrix, Shape(rank=rank, code_bits=bits, bucket=bucket), config).values())
            for bits, bucket in codes
            for rank in (0, *ranks)
        ]
        least, most = least + min(sizes), most + max(sizes)
    return least, most


def _coded(matrix: tuple[int, int], shape: Shape, config: ReallmConfig) -> Mapping[str, int]:
    (rows, columns), bits, bucket = matrix, shape.code_bits, shape.bucket
    tiles = -(-columns // _TILE_COLUMNS)
    if config.residual == NERV:
        given = config.nerv.bits if config.target_bits is None else None
        return {"codes": int((bits if given is None else given) * rows * columns)}
    if config.residual == NF:
        return {"codes": _stream(rows * columns, bits), "scales": scales_size(rows * tiles)}
    if config.residual == AQLM:
        books, groups = num_codebooks(bits), rows * -(-columns // bucket)
        book = HALF * books * bucket << bits // books
        return {"codes": _stream(groups * books, bits // books), "codebooks": book, "scales": HALF * rows}
    vectors = -(-rows // bucket)
    found = {"codes": _stream(vectors * columns, bits), "codebooks": HALF * bucket << bits}
    if not config.permute:
        return {**found, "scales": scales_size(vectors)}
    blocks = -(-vectors // max(1, BLOCK_ROWS // bucket))
    return {**found, "scales": scales_size(vectors * tiles), "permutation": HALF * blocks * columns}


def _stream(count: int, bits: int) -> int:
    """Codes in whole words, those above a byte in a stream of their own."""
    high = packed_words(count, bits - _BYTE) if bits > _BYTE else 0
    return WORD * (packed_words(count, min(bits, _BYTE)) + high)
