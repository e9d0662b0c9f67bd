"""FLAP's first stage: one pass of the original model over the text, scores of heads and neurons, and what stays.

Legend: I input channels of the linear behind attention or behind the neurons.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext
from algorithms.blockwise.stages import read_json
from algorithms.modeling.activations import Activations, embed
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.files import atomic_save_tensors, atomic_write_json, folder_digest
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.source import NOTHING_FINITE, ModelError, ModelSource
from algorithms.modeling.transforms.narrowing import Kept, Widths, attention_output, neuron_output, widths
from algorithms.numerics.pruning.elimination import removal_losses
from algorithms.numerics.pruning.moments import Moments, together
from algorithms.numerics.pruning.scores import channel_scores, standardised
from algorithms.numerics.pruning.selection import BlockScores, Budget, select
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import Ranks
from algorithms.pruning.flap.config import FlapConfig

logger = logging.getLogger(__name__)

KIND = "flap-ranking"
_KEPT, _MEANS = "kept.json", "means.safetensors"
_TOKENS_PER_BATCH = 4096
OBS = "OBS"  # what is lost when all that is left makes up for it; beside FLAP's own metrics
_RIDGE = 0.01


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Of the I channels that one linear reads: their moments and, where that was asked for, E x x^T [I, I] in float32."""

    moments: Moments
    hessian: Tensor | None = None

    def covariance(self, centred: bool) -> Tensor:
        """About the mean or, where no bias can stand for it, about zero, [I, I] float64."""
        assert self.hessian is not None
        covariance, mean = self.hessian.double(), self.moments.mean
        return covariance.addr_(mean, mean, alpha=-1) if centred else covariance


@dataclass(frozen=True, kw_only=True)
class BlockRanking:
    """What stays of a block of ``groups`` groups of heads and ``neurons`` neurons.

    ``means`` are those of all its channels in the original model, float32, by the linear that reads them.
    """

    kept: Kept
    groups: int
    neurons: int
    means: Mapping[str, Tensor]

    @property
    def is_whole(self) -> bool:
        """Whether nothing goes."""
        return len(self.kept.groups) == self.groups and len(self.kept.neurons) == self.neurons


def rank(context: StageContext, config: FlapConfig, biased: frozenset[str]) -> Artifact:
    """Score and choose; leaves kept.json, which says what stays of every block and why, and the means of all channels.

    All ranks look at their own sequences. Rank 0 alone scores and chooses, so that its choice is everyone's: later stages read
    it from the folder.

    Args:
        context: of the stage.
        config: metric, structure and ratio.
        biased: the linears, of those behind attention and behind the neurons, that may get a bias.
    """
    source, first = context.source.with_attention(config.attn_implementation), config.start_pruning_layer_idx
    architecture, ranks, directory = source.architecture, context.ranks, context.output_dir
    (states,) = embed(
        source,
        [ranks.mine(context.tokens)],
        batch_size=max(1, _TOKENS_PER_BATCH // config.sequence_length),
        device=context.device,
        offload=config.offload_activations,
        dtype=torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype),
    )
    costs = budget(source, config)
    centred = {name: name in biased for name in (attention_output(architecture), neuron_output(architecture))}
    means: dict[str, Tensor] = {}
    scores, sizes = [], []
    with context.progress("flap ranking", source.num_blocks) as advance:
        for index in range(source.num_blocks):
            block = source.load_block(index, device=context.device)
            found = look_at(block, index, states, architecture, ranks, with_hessians=config.metrics == OBS)
            means |= {f"{index}.{name}": channels.moments.mean.float().cpu() for name, channels in found.items()}
            if index >= first and ranks.is_main:
                scores.append(block_scores(block, architecture, found, metric=config.metrics, costs=costs, centred=centred))
            sizes.append(widths(block, architecture))
            advance(f"block {index + 1}")
    digest = ""
    if ranks.is_main:
        _say_what_is_rounded(config, costs.removed_groups * sizes[0].heads_a_group)
        chosen = select(config.structure, scores, costs)
        kept = [_all(size) for size in sizes[:first]] + [Kept(groups=one.groups, neurons=one.neurons) for one in chosen]
        atomic_save_tensors(directory / _MEANS, means)
        _write(directory, config, sizes, kept)
        digest = folder_digest(directory)
    ranks.meet()
    return Artifact(kind=KIND, directory=directory, digest=ranks.from_main(digest))


def read_ranking(directory: Path) -> list[BlockRanking]:
    """What :func:`rank` has left, block by block."""
    means, blocks = load_file(directory / _MEANS), read_json(directory / _KEPT)["blocks"]
    return [
        BlockRanking(
            kept=Kept(groups=tuple(block["groups"]), neurons=tuple(block["neurons"])),
            groups=block["of_groups"],
            neurons=block["of_neurons"],
            means={name.partition(".")[2]: mean for name, mean in means.items() if name.partition(".")[0] == str(index)},
        )
        for index, block in enumerate(blocks)
    ]


def ranking_facts(directory: Path) -> Mapping[str, Any]:
    """kept.json of a ranking."""
    return read_json(directory / _KEPT)


def look_at(
    block: nn.Module,
    index: int,
    states: Activations,
    architecture: ModelArchitecture,
    ranks: Ranks,
    *,
    with_hessians: bool = False,
) -> dict[str, Channels]:
    """The channels behind attention and the neurons, by the linear that reads them; the hidden states pass the block.

    Raises:
        ModelError: no finite token was seen.
    """
    names = (attention_output(architecture), neuron_output(architecture))
    channels = {name: block.get_submodule(name).weight.shape[1] for name in names}
    found = {}
    with BlockWalk(block, index, states, names) as walk:
        for name, count in channels.items():
            own = Moments.none(count, states.device)
            statistics = InputStatistics(count, states.device) if with_hessians else None
            passed = 0
            for batch in walk.next_stop():
                passed += batch.shape[:-1].numel()
                own = own.with_(Moments.of(batch))
                if statistics is not None:
                    statistics.update(batch)
            if own.count < passed:
                left_out = passed - own.count
                logger.warning(
                    "block %d: %d tokens with infinite, NaN or far too large inputs of %s left out", index, left_out, name
                )
            moments = together(ranks.exchange(own))
            if not moments.count:
                raise ModelError(NOTHING_FINITE.format(index=index))
            if statistics is not None:
                statistics.add_up(ranks.sum_)
            found[name] = Channels(moments=moments, hessian=None if statistics is None else statistics.hessian())
        for place, output in enumerate(walk.outputs()):
            states.take(place, output)
    return found


def block_scores(
    block: nn.Module,
    architecture: ModelArchitecture,
    found: Mapping[str, Channels],
    *,
    metric: str,
    costs: Budget,
    centred: Mapping[str, bool],
) -> BlockScores:
    """Scores of the groups of heads and of the neurons of a block.

    OBS gives both what they cost when they are taken out, and compares it a parameter. FLAP's own scores of attention are
    squared before use; within a block a group has the sum over its channels, among blocks the mean of its standardised ones.

    Args:
        block: the block.
        architecture: of its model.
        found: what :func:`look_at` has seen.
        metric: one of METRICS.
        costs: of a group and of a neuron, in parameters.
        centred: by linear, whether a bias can stand for the mean of what it no longer reads.
    """
    readers = (attention_output(architecture), neuron_output(architecture))
    weights = [block.get_submodule(name).weight for name in readers]
    groups = widths(block, architecture).groups
    if metric == OBS:
        units = (weights[0].shape[1] // groups, 1)
        losses = [
            removal_losses(weight, found[name].covariance(centred[name]), width=width, ridge=_RIDGE)
            for name, weight, width in zip(readers, weights, units, strict=True)
        ]
        return BlockScores(
            groups=losses[0],
            neurons=losses[1],
            common_groups=losses[0] / costs.group_cost,
            common_neurons=losses[1] / costs.neuron_cost,
        )
    attention = channel_scores(metric, weights[0], found[readers[0]].moments).square()
    neurons = channel_scores(metric, weights[1], found[readers[1]].moments)
    return BlockScores(
        groups=attention.view(groups, -1).sum(1),
        neurons=neurons,
        common_groups=standardised(attention).view(groups, -1).mean(1),
        common_neurons=standardised(neurons),
    )


def budget(source: ModelSource, config: FlapConfig) -> Budget:
    """What the recipe's ratio comes to for a model.

    Raises:
        ValueError: more heads are to go than there are.
    """
    architecture, block = source.architecture, source.block_skeleton()
    size = widths(block, architecture)
    shapes = {name: block.get_submodule(name).weight.shape for name in architecture.linears}
    behind = (attention_output(architecture), neuron_output(architecture))
    inside = [name for name in architecture.linears if name in (*architecture.qkv, behind[0])]
    pruned_blocks = source.num_blocks - config.start_pruning_layer_idx
    removed = config.groups_to_remove(blocks=pruned_blocks, groups=size.groups, heads_a_group=size.heads_a_group)
    return Budget(
        ratio=config.pruning_ratio,
        group_cost=sum(shapes[name].numel() for name in inside) // size.groups,
        neuron_cost=sum(shape.numel() for name, shape in shapes.items() if name not in inside) // size.neurons,
        removed_groups=removed,
    )


def _say_what_is_rounded(config: FlapConfig, heads: int) -> None:
    if config.tells_heads and heads != config.remove_heads:
        alike = ", as many of every block" if config.structure.startswith("UL") else ""
        logger.warning("remove_heads: %d heads are to go instead of %d: whole groups go%s", heads, config.remove_heads, alike)


def _all(size: Widths) -> Kept:
    return Kept(groups=tuple(range(size.groups)), neurons=tuple(range(size.neurons)))


def _write(directory: Path, config: FlapConfig, sizes: Sequence[Widths], kept: Sequence[Kept]) -> None:
    blocks = [
        {"groups": list(one.groups), "of_groups": size.groups, "neurons": list(one.neurons), "of_neurons": size.neurons}
        for one, size in zip(kept, sizes, strict=True)
    ]
    facts = {"metrics": config.metrics, "structure": config.structure, "pruning_ratio": config.pruning_ratio}
    atomic_write_json(directory / _KEPT, {**facts, "blocks": blocks})
