"""ReALLM's first stage where bits are shared out: measures every matrix of the original model and chooses its shape.

Errors of a matrix are measured under the Hessian of its input, and weighed by what they do to the hidden states behind the
block: the block is run once more with that matrix alone as a probe leaves it. A block's curves are kept as soon as they are
there, so that a survey that was stopped goes on behind them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext
from algorithms.blockwise.pipeline import linear_shapes
from algorithms.blockwise.stages import TOKENS_PER_BATCH, read_json
from algorithms.modeling.activations import Activations, embed
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.files import atomic_write_json, folder_digest
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.mixtures.routing import stops
from algorithms.modeling.source import ModelSource
from algorithms.numerics.low_rank.allocation import allocate
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import Ranks, share_out
from algorithms.quantization.reallm.config import ReallmConfig
from algorithms.quantization.reallm.shapes import Shape, place, write_shapes
from algorithms.quantization.reallm.survey.curves import Curves, Probe, measure
from algorithms.quantization.reallm.survey.sizes import refuse_out_of_reach

logger = logging.getLogger(__name__)

KIND = "reallm-survey"
_KEY = "llm.ReALLM.target_bits"
_CLOSE = 0.01  # bits a weight within which a budget counts as met
# A ranking needs fewer tokens than a fit: the Hessian of the widest input is known well enough, and so are the effects.
_TOKENS_PER_INPUT = 24
_JUDGED_TOKENS = 2048


def shaping(config: ReallmConfig) -> Mapping[str, object]:
    """Every value that shapes what the survey chooses."""
    return {
        "target_bits": config.target_bits,
        "residual": config.residual,
        "low_rank_bits": config.low_rank_bits,
        "permute": config.permute,
        "dtype": config.dtype,
        "seed": config.seed,
        **({} if config.min_expert_tokens is None else {"min_expert_tokens": config.min_expert_tokens}),
        **config.decoder_shaping,
    }


def look(context: StageContext, config: ReallmConfig) -> Artifact:
    """Measure all matrices and choose; leaves shapes.json. Ranks share out sequences and matrices; rank 0 chooses."""
    source, ranks, directory = context.source.with_attention(config.attn_implementation), context.ranks, context.output_dir
    known = ranks.from_main(_kept(directory, source.num_blocks) if ranks.is_main else {})
    widest = max(columns for _, columns in linear_shapes(source).values())
    enough, judging = (-(-tokens // config.sequence_length) for tokens in (_TOKENS_PER_INPUT * widest, _JUDGED_TOKENS))
    states, judged = embed(
        source,
        [ranks.mine(context.tokens[:enough]), context.tokens[:judging]],
        batch_size=max(1, TOKENS_PER_BATCH // config.sequence_length),
        device=context.device,
        offload=config.offload_activations,
        dtype=torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype),
    )
    curves: dict[str, Curves] = {}
    with context.progress("ReALLM survey", source.num_blocks) as advance:
        for index in range(source.num_blocks):
            block = source.load_block(index, device=context.device)
            if index in known:
                found = known[index]
                for hidden in (states, judged):
                    hidden.advance(block, index)
            else:
                hessians = _hessians(block, index, states, source.architecture, ranks, config.min_expert_tokens)
                found = _measured(block, index, hessians, judged, config, ranks)
                if ranks.is_main:
                    atomic_write_json(directory / _file(index), {name: part.to_json() for name, part in found.items()})
            curves |= {place(index, name): part for name, part in found.items()}
            advance(f"block {index + 1}")
    digest = ""
    if ranks.is_main:
        write_shapes(directory, *choose(curves, source, config))
        digest = folder_digest(directory)
    ranks.meet()
    return Artifact(kind=KIND, directory=directory, digest=ranks.from_main(digest))


def choose(
    curves: Mapping[str, Curves], source: ModelSource, config: ReallmConfig
) -> tuple[dict[str, Shape], dict[str, object]]:
    """The shape of every matrix within the recipe's budget, and figures of the choice.

    Raises:
        StageError: the budget is out of reach.
    """
    assert config.target_bits is not None
    parameters = sum(rows * columns for rows, columns in (found.shape for found in curves.values()))
    options = {name: found.options(config.low_rank_bits) for name, found in curves.items()}
    counted = [list(found.values()) for found in options.values()]
    least, most = (sum(limit(option.bits for option in found) for found in counted) / parameters for limit in (min, max))
    refuse_out_of_reach(config.target_bits, least, most)
    places = allocate(counted, int(config.target_bits * parameters))
    shapes = {name: list(found)[chosen] for (name, found), chosen in zip(options.items(), places, strict=True)}
    bits = sum(options[name][shape].bits for name, shape in shapes.items()) / parameters
    if bits < config.target_bits - _CLOSE:
        logger.warning("%s: matrices are so few and small that %.3f bits of %g are used", _KEY, bits, config.target_bits)
    error = sum(options[name][shape].error for name, shape in shapes.items())
    return shapes, {"bits_per_weight": bits, "expected_error": error / len(shapes)}


def _hessians(
    block: nn.Module,
    index: int,
    states: Activations,
    architecture: ModelArchitecture,
    ranks: Ranks,
    min_expert_tokens: int | None,
) -> dict[str, Tensor]:
    """The Hessian of every linear's input; the hidden states pass the block."""
    found: dict[str, Tensor] = {}
    groups = architecture.groups_in(block)
    leaders = {group[0]: block.get_submodule(group[0]).weight.shape[1] for group in groups}
    with BlockWalk(block, index, states, stops(groups, architecture)) as walk:
        for group in walk.in_turn(groups, architecture, ranks, min_expert_tokens):
            statistics = InputStatistics(leaders[group[0]], states.device)
            for batch in walk.next_stop():
                statistics.update(batch)
            ranks.meet()
            statistics.add_up(ranks.sum_)
            found |= dict.fromkeys(group, statistics.hessian())
        for number, output in enumerate(walk.outputs()):
            states.take(number, output)
    return found


def _measured(
    block: nn.Module,
    index: int,
    hessians: Mapping[str, Tensor],
    judged: Activations,
    config: ReallmConfig,
    ranks: Ranks,
) -> dict[str, Curves]:
    """The curves of all linears of a block, each measured by one rank; the judged hidden states pass the block."""
    weights = {name: block.get_submodule(name).weight.detach().float() for name in hessians}
    owners = share_out({name: weight.numel() for name, weight in weights.items()}, ranks.size)
    before = judged.copy()
    judged.advance(block, index)
    mine = {}
    for name, weight in weights.items():
        if owners[name] == ranks.rank:
            found, probe = measure(weight, hessians[name], config, (index, name))
            mine[name] = replace(found, effect=effect(block, index, name, probe, before, judged))
    parts = ranks.exchange(mine)
    return {name: found for name in hessians for part in parts for known, found in part.items() if known == name}


def effect(block: nn.Module, index: int, name: str, probe: Probe, inputs: Activations, outputs: Activations) -> float:
    """What a linear does to the block's outputs for each unit of its relative error: see :class:`Curves`.

    Args:
        block: as it was.
        index: its number.
        name: of the linear.
        probe: the linear's weight with an error.
        inputs: of the block.
        outputs: of the block as it was.
    """
    linear = block.get_submodule(name)
    weight = linear.weight.data
    linear.weight.data = probe.matrix.to(weight)
    try:
        changed = inputs.through(block, index)
    finally:
        linear.weight.data = weight
    changes, tokens = 0.0, 0
    for now, was in zip(changed, outputs, strict=True):
        lengths = was.double().square().sum(2).clamp(min=torch.finfo(torch.float32).tiny)
        changes += float(((now - was).double().square().sum(2) / lengths).sum())
        tokens += lengths.numel()
    found = changes / max(tokens, 1) / probe.error if probe.error > 0 else 0.0
    return found if math.isfinite(found) else 1.0


def _file(index: int) -> str:
    """Where a block's curves are kept."""
    return f"curves-{index}.json"


def _kept(directory: Path, blocks: int) -> dict[int, dict[str, Curves]]:
    """The curves that an earlier run has left, by block."""
    paths = {index: directory / _file(index) for index in range(blocks)}
    return {
        index: {name: Curves.from_json(part) for name, part in read_json(path).items()}
        for index, path in paths.items()
        if path.is_file()
    }
