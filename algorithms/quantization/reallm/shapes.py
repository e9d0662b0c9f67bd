"""The shape of one matrix's coding, and the coder that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from algorithms.blockwise.stages import read_json
from algorithms.modeling.files import atomic_write_json
from algorithms.numerics.residuals.aqlm import AdditiveCoder
from algorithms.numerics.residuals.coder import ResidualCoder
from algorithms.numerics.residuals.nf import NormalFloatCoder
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings
from algorithms.quantization.reallm.config import AQLM, NF, VQ, ReallmConfig

SHAPES = "shapes.json"


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """``rank`` of the low-rank part, and ``code_bits`` for every ``bucket`` weights of the residual."""

    rank: int
    code_bits: int
    bucket: int


# A survey compares codes, which the sweep alone ranks as the whole fit would: in half its time.
_ROUNDS, _SURVEYED_ROUNDS = 1, 0
_CODERS: Mapping[str, Callable[[Shape, ReallmConfig, int], ResidualCoder]] = {
    VQ: lambda shape, config, rounds: VectorCoder(
        VectorSettings(code_bits=shape.code_bits, bucket=shape.bucket, permutes=config.permute, rounds=rounds)
    ),
    NF: lambda shape, config, rounds: NormalFloatCoder(shape.code_bits, rounds),
    AQLM: lambda shape, config, rounds: AdditiveCoder(shape.code_bits, shape.bucket),
}


def coder(shape: Shape, config: ReallmConfig, *, surveys: bool = False) -> ResidualCoder:
    """The coder of residuals that a recipe names, for one shape; one that only ``surveys`` fits less closely.

    Raises:
        ValueError: this version has no such coder.
    """
    check_residual(config)
    return _CODERS[config.residual](shape, config, _SURVEYED_ROUNDS if surveys else _ROUNDS)


def check_residual(config: ReallmConfig) -> None:
    """Refuse a coder that this version lacks.

    Raises:
        ValueError: it lists those that there are.
    """
    if config.residual not in _CODERS:
        raise ValueError(f"llm.ReALLM.residual: {config.residual} is not in this version; there are {', '.join(_CODERS)}.")


def uniform_shape(config: ReallmConfig) -> Shape:
    """The shape that the recipe gives all matrices."""
    bucket = 1 if config.residual == NF else config.bucket
    return Shape(rank=config.rank, code_bits=config.num_bits * bucket, bucket=bucket)


def write_shapes(directory: Path, shapes: Mapping[str, Shape], facts: Mapping[str, object]) -> None:
    """Keep the shapes of all matrices, by ``<block> <linear>``, with what led to them."""
    atomic_write_json(directory / SHAPES, {**facts, "shapes": {name: asdict(shape) for name, shape in shapes.items()}})


def read_shapes(directory: Path) -> dict[str, Shape]:
    """The inverse of :func:`write_shapes`."""
    return {name: Shape(**shape) for name, shape in read_json(directory / SHAPES)["shapes"].items()}


def place(index: int, linear: str) -> str:
    """The name of a block's linear among shapes."""
    return f"{index} {linear}"
