"""About how much work ReALLM's stages are, from a model's shapes: for a plan before anything has been measured."""

from __future__ import annotations

from collections.abc import Mapping

from algorithms.modeling.source import ModelSource
from algorithms.quantization.reallm.config import AQLM, BLOC, CALIBRATION, GLOBAL, NERV, NF, SURVEY, ReallmConfig
from algorithms.workload import ModelShapes, Workload

# Passes over all columns in a turn, in which each meets every other: a sweep, the steps of the codebook, two refinements.
_PASSES = 12
_SEARCHES = 20  # for the nearest of all codewords: as many by k-means as in the sweep and the refinements
_TURNS = 3  # that most alternations take
_WIDEST_BOOK = 8  # bits
# A decoder in one epoch, forward and back, for every weight: some ten thousand multiplications of its convolutions.
_OPERATIONS_AN_EPOCH = 2e4
_SURVEYED = 14  # codes and ranks that a survey tries, each with a sweep alone


def workloads(config: ReallmConfig, source: ModelSource, tokens: Mapping[str, int]) -> dict[str, Workload]:
    """Of every stage with a text: walks, what is fitted on them, and a distillation."""
    shapes = ModelShapes.of(source)
    turns, a_turn = min(config.iterations, _TURNS), shapes.blocks * shapes.block_parameters * _a_weight(config, shapes)
    found = {CALIBRATION: shapes.walk(tokens[CALIBRATION]).plus(turns * a_turn)}
    if config.target_bits is not None:
        found[SURVEY] = shapes.walk(tokens[SURVEY]).plus(_SURVEYED / 4 * a_turn)
    if config.block_tuning is not None:
        refits = turns * a_turn if config.block_tuning.refit else 0.0
        found[BLOC] = shapes.walk(tokens[BLOC], tuning_epochs=config.block_tuning.max_epochs).plus(refits)
    tuning = config.global_tuning
    if tuning is not None:
        sequences, length = tuning.micro_batch_size or tuning.batch_size, tuning.sequence_length
        found[GLOBAL] = shapes.distillation(tokens[GLOBAL], epochs=tuning.max_epochs, sequences=sequences, length=length)
    return found


def _a_weight(config: ReallmConfig, shapes: ModelShapes) -> float:
    """Operations for a weight in one turn of the alternation."""
    if config.residual == NERV:
        return _OPERATIONS_AN_EPOCH * config.nerv.epochs
    sweeps = 2.0 * _PASSES * shapes.hidden
    if config.residual == NF:
        return sweeps
    books = -(-config.code_bits // _WIDEST_BOOK) if config.residual == AQLM else 1
    return sweeps + 2.0 * _SEARCHES * books * 2 ** (config.code_bits // books)
