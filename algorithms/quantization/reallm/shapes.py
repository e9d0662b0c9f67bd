"""The shape of one matrix's coding, and the coder that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from algorithms.blockwise.pipeline import linear_shapes
from algorithms.blockwise.stages import read_json
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.numerics.residuals.aqlm import AdditiveCoder
from algorithms.numerics.residuals.coder import ResidualCoder
from algorithms.numerics.residuals.neural.budget import DecoderSizes, plan
from algorithms.numerics.residuals.neural.coder import NeuralCoder
from algorithms.numerics.residuals.neural.training import Display, TrainingSettings
from algorithms.numerics.residuals.nf import NormalFloatCoder
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings
from algorithms.quantization.reallm.config import AQLM, NERV, NF, VQ, ReallmConfig

SHAPES = "shapes.json"


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """``rank`` of the low-rank part, and ``code_bits`` for every ``bucket`` weights of the residual."""

    rank: int
    code_bits: int
    bucket: int


# A survey compares codes, which the sweep alone ranks as the whole fit would: in half its time.
_ROUNDS, _SURVEYED_ROUNDS = 1, 0
_SURVEYED_ITERATIONS = 4  # of k-means
_SURVEYED_EPOCHS = 4  # of which a survey's trainings have one
DECODER_BITS = (2, 3, 4)  # that a survey tries


def coder(shape: Shape, config: ReallmConfig, *, surveys: bool = False, display: Display | None = None) -> ResidualCoder:
    """The coder of residuals that a recipe names, for one shape; one that only ``surveys`` fits less closely.

    ``display`` shows how far a training is.
    """
    rounds = _SURVEYED_ROUNDS if surveys else _ROUNDS
    if config.residual == VQ:
        settings = VectorSettings(code_bits=shape.code_bits, bucket=shape.bucket, permutes=config.permute, rounds=rounds)
        return VectorCoder(replace(settings, book_iterations=_SURVEYED_ITERATIONS) if surveys else settings)
    if config.residual == NF:
        return NormalFloatCoder(shape.code_bits, rounds)
    if config.residual == AQLM:
        return AdditiveCoder(shape.code_bits, shape.bucket)
    return NeuralCoder(
        decoder_sizes(shape, config), _training_settings(config, surveys), loss=config.nerv.loss, display=display
    )


def decoder_sizes(shape: Shape, config: ReallmConfig) -> DecoderSizes:
    """What the decoder of one shape may take; a survey's choice of bits stands above the recipe's."""
    asked = config.nerv
    chosen = asked.bits if config.target_bits is None else None
    return DecoderSizes(
        bits=float(shape.code_bits) if chosen is None else chosen,
        strides=asked.strides,
        patch_size=asked.patch_size,
        block_size=asked.block_size,
        embedding_dim=asked.embedding_dim,
        embedding_bits=asked.embedding_bits,
        weight_bits=asked.weight_bits,
        decoder_share=asked.decoder_share,
    )


def check_decoders(config: ReallmConfig, source: ModelSource) -> None:
    """Refuse a budget that leaves the decoder of some linear no room.

    Raises:
        ValueError: what is wrong, and which key to change.
    """
    if config.residual != NERV:
        return
    tried = replace(uniform_shape(config), code_bits=min(DECODER_BITS))
    sizes = decoder_sizes(uniform_shape(config) if config.target_bits is None else tried, config)
    for name, shape in linear_shapes(source).items():
        try:
            plan(shape, sizes)
        except ValueError as error:
            raise ValueError(f"llm.ReALLM.nerv: {name}, {error}") from None


def _training_settings(config: ReallmConfig, surveys: bool) -> TrainingSettings:
    asked = config.nerv
    return TrainingSettings(
        epochs=-(-asked.epochs // _SURVEYED_EPOCHS) if surveys else asked.epochs,
        lr=asked.lr,
        batch_size=asked.batch_size,
        encoder_width=asked.encoder_width,
        encoder_share=asked.encoder_share,
    )


def uniform_shape(config: ReallmConfig) -> Shape:
    """The shape that the recipe gives all matrices."""
    bucket = 1 if config.residual in (NF, NERV) else config.bucket
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
