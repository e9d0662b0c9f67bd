"""ReALLM's calibration, and its block-wise tuning: each matrix becomes residual, low-rank part and magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, Progress, StageContext
from algorithms.blockwise.coded import CodedCompressor, FreshBlock, Method
from algorithms.blockwise.pipeline import followed_sequences, total_bits
from algorithms.blockwise.stages import Calibration, calibrate
from algorithms.finetuning.block_tuning import TuningReport, tune_block, tuning_settings
from algorithms.formats.reallm.packed import LAYOUT, pack, stored_bits, unpack
from algorithms.modeling.block_loop import BlockData
from algorithms.modeling.block_store import BlockStore
from algorithms.numerics.low_rank.alternation import Decomposition, alternate
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.spread import Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import moved
from algorithms.quantization.reallm.config import ReallmConfig
from algorithms.quantization.reallm.shapes import Shape, coder
from algorithms.quantization.reallm.tuning_config import LowRankTuningConfig
from algorithms.quantization.reallm.weight import LowRankLinear

NAME = "reallm"
CALIBRATED, TUNED = f"{NAME}-calibration", f"{NAME}-finetune_bloc"

ShapeOf = Callable[[int, str], Shape]


@dataclass(kw_only=True)
class _Block:
    """The block that is being compressed, and what an earlier stage made of its linears."""

    index: int
    earlier: Mapping[str, LowRankWeight]


class Fits:
    """Fits the linears of one block after another, anew or from an earlier stage's result on.

    Args:
        config: the recipe's keys.
        shape_of: the shape of a block's linear.
        progress: opens displays of trainings, where residuals need any.
        earlier: a folder in the layout of a calibration, or None.
    """

    def __init__(self, config: ReallmConfig, shape_of: ShapeOf, progress: Progress, earlier: Path | None = None) -> None:
        self._config, self._shape_of, self._progress = config, shape_of, progress
        self._store = None if earlier is None else BlockStore(earlier)
        self._refits = earlier is None or (config.block_tuning is not None and config.block_tuning.refit)
        self._block = _Block(index=-1, earlier={})

    def begin(self, fresh: FreshBlock) -> Mapping[str, object]:
        """Hear which block is next."""
        earlier: dict[str, LowRankWeight] = {}
        if self._store is not None:
            loaded = self._store.load(fresh.index)
            if loaded is None:
                raise ValueError(
                    f"block {fresh.index} of {self._store.directory} is missing or damaged; run again with overwrite: true"
                )
            device = next(fresh.block.parameters()).device
            tensors = moved(loaded[0], device)
            earlier = {name: unpack(tensors, name) for name in LAYOUT.packed_linears(list(tensors))}
        self._block = _Block(index=fresh.index, earlier=earlier)
        return {}

    def fit(self, wanted: Mapping[str, Tensor], statistics: InputStatistics | None, spread: Spread) -> dict[str, LowRankWeight]:
        """Weights for linears that share an input; every one is whole, whoever fits it."""
        assert statistics is not None
        hessian = statistics.hessian()
        return {name: self._fit_one(name, matrix, hessian) for name, matrix in wanted.items()}

    def _fit_one(self, name: str, matrix: Tensor, hessian: Tensor) -> LowRankWeight:
        config, block = self._config, self._block
        earlier = block.earlier.get(name)
        if earlier is not None and not self._refits:
            return earlier
        start, shape = None, self._shape_of(block.index, name)
        if earlier is not None:
            start = Decomposition(residual=earlier.residual, low_rank=earlier.low_rank, errors=())
        found = alternate(
            matrix,
            hessian,
            coder(shape, config, display=partial(self._progress, f"block {block.index} {name} decoder")),
            keyed_generator(config.seed, NAME, block.index, name),
            rank=shape.rank,
            factor_bits=config.low_rank_bits,
            iterations=config.iterations,
            start=start,
        )
        return LowRankWeight.of(found, config.residual)


def fit_blocks(context: StageContext, config: ReallmConfig, shape_of: ShapeOf, *, earlier: Path | None = None) -> Artifact:
    """Walk through the model: the calibration, or with the folder of an ``earlier`` one the block-wise tuning after it."""
    source = context.source.with_attention(config.attn_implementation)
    tuning = None if earlier is None else config.block_tuning
    fits = Fits(config, shape_of, context.progress, earlier)
    method = Method[LowRankWeight](
        name=NAME,
        fit=fits.fit,
        pack=pack,
        dense_state=LAYOUT.dense_state,
        stored_bits=stored_bits,
        tunable=lambda stored, wanted, bias: LowRankLinear(stored, bias),
        tuned=lambda module, stored: module.stored(),
        tune=tune_low_rank,
        prepare=fits.begin,
    )
    how = Calibration(
        name="ReALLM" if earlier is None else "ReALLM block tuning",
        kind=CALIBRATED if earlier is None else TUNED,
        follows_original=config.targets == "original",
        reference_sequences=followed_sequences(config, source, tunes=tuning is not None),
        sequential=config.true_sequential,
        min_expert_tokens=config.min_expert_tokens,
        sequence_length=config.sequence_length,
        dtype=config.dtype,
        offload=config.offload_activations,
        facts=lambda reports: {"bits": total_bits(reports)},
    )
    compressor = CodedCompressor(method, source.architecture, tuning=tuning, seed=config.seed, ranks=context.ranks)
    return calibrate(context, source, compressor, how)


def tune_low_rank(
    index: int, block: nn.Module, data: BlockData, config: LowRankTuningConfig, generator: torch.Generator
) -> TuningReport:
    """Tune a block of :class:`LowRankLinear`; see :func:`algorithms.finetuning.block_tuning.tune_block`."""
    settings = tuning_settings(config, data.sequence_length)
    return tune_block(index, block, data, learning_rates(block, config), settings, generator)


def learning_rates(block: nn.Module, config: LowRankTuningConfig) -> list[tuple[nn.Parameter, float]]:
    """Every parameter that is tuned, with Adam's peak rate for it."""
    steps: dict[int, float | None] = {}
    for module in block.modules():
        if isinstance(module, LowRankLinear):
            steps |= {id(module.up): config.low_rank_step, id(module.down): config.low_rank_step}
            steps[id(module.magnitude)] = config.magnitude_step
            steps |= {id(parameter): config.residual_step for parameter in module.coded.values()}
    rates = []
    for parameter in block.parameters():
        step = steps.get(id(parameter), config.other_step)
        if step is None or not parameter.numel():
            continue
        # A bias that starts at zero has no size of its own.
        rates.append((parameter, config.lr or step * (parameter.detach().square().mean().sqrt().item() or 1.0)))
    return rates
