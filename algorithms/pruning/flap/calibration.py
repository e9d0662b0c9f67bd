"""FLAP's second stage: every block is narrowed, and what reads the channels that are left learns to do without the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext
from algorithms.blockwise.pipeline import linear_shapes
from algorithms.blockwise.stages import Calibration, calibrate, round_to_storage
from algorithms.formats.storage import to_storage
from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.block_loop import BlockData
from algorithms.modeling.transforms.narrowing import (
    attention_output,
    fill_narrowed,
    linear_of,
    narrow,
    neuron_output,
    query_channels,
    widths,
)
from algorithms.numerics.statistics import InputStatistics
from algorithms.pruning.flap.config import FlapConfig
from algorithms.pruning.flap.ranking import BlockRanking, ranking_facts, read_ranking

logger = logging.getLogger(__name__)

KIND = "flap-pruning"
LEAST_SQUARES, BIAS = "least_squares", "bias"


def prune(context: StageContext, artifact: Artifact, config: FlapConfig, biased: frozenset[str]) -> Artifact:
    """Narrow all blocks as the ranking says; leaves a calibration's folder, whose blocks are narrow and in float16.

    Args:
        context: of the stage.
        artifact: the ranking.
        config: how to compensate.
        biased: the linears, of those behind attention and behind the neurons, that may get a bias.
    """
    source = context.source.with_attention(config.attn_implementation)
    original = sum(rows * columns for rows, columns in linear_shapes(source).values()) * source.num_blocks
    how = Calibration(
        name="flap pruning",
        kind=KIND,
        follows_original=config.compensation == LEAST_SQUARES,
        reference_sequences=config.reference_samples,
        sequential=True,
        sequence_length=config.sequence_length,
        dtype=config.dtype,
        offload=config.offload_activations,
        facts=lambda reports: {"bits": _bits(reports, original), "ranking": ranking_facts(artifact.directory)},
    )
    if leaves_means_alone(config, source.architecture):
        logger.warning(
            "compensation: least_squares refits what is added to the residual stream as it is, which nothing in %s is; biases "
            "for the means of what goes are added where there is a place for them",
            source.architecture.model_type,
        )
    compressor = FlapCompressor(config, read_ranking(artifact.directory), source.architecture, biased)
    return calibrate(context, source, compressor, how)


def leaves_means_alone(config: FlapConfig, architecture: ModelArchitecture) -> bool:
    """Whether least squares has nothing to refit, as where norms follow what attention and the MLP give: means stand for it."""
    return config.compensation == LEAST_SQUARES and not architecture.residual_writers


class FlapCompressor:
    """See :class:`algorithms.modeling.block_loop.BlockCompressor`.

    Args:
        config: how to compensate.
        ranking: what stays of every block.
        architecture: of the model.
        biased: the linears that may get a bias.
    """

    tunes = False

    def __init__(
        self,
        config: FlapConfig,
        ranking: Sequence[BlockRanking],
        architecture: ModelArchitecture,
        biased: frozenset[str],
    ) -> None:
        self._config, self._ranking, self._architecture, self._biased = config, ranking, architecture, biased
        narrowed = [index for index, block in enumerate(ranking) if not block.is_whole]
        self._leaves_means = config.compensation == BIAS or leaves_means_alone(config, architecture)
        self._first_narrowed = narrowed[0] if narrowed else len(ranking)
        self._started = 0.0
        self._report: dict[str, object] = {}
        self._had_bias: set[str] = set()

    def prepare_block(self, index: int, block: nn.Module, inputs: Activations | None) -> None:
        """Narrow the block; channels that go leave their means behind, where that is asked for."""
        self._started, ranking, architecture = time.process_time(), self._ranking[index], self._architecture
        self._had_bias = {name for name in architecture.linears if block.get_submodule(name).bias is not None}
        biases = self._biases_of_the_gone(ranking, block) if self._leaves_means else {}
        narrow(block, architecture, ranking.kept)
        for name, bias in biases.items():
            linear = block.get_submodule(name)
            block.set_submodule(name, linear_of(linear.weight, bias if linear.bias is None else linear.bias + bias))
        round_to_storage(block, ())
        self._report = {"groups": len(ranking.kept.groups), "neurons": len(ranking.kept.neurons)}

    def _biases_of_the_gone(self, ranking: BlockRanking, block: nn.Module) -> dict[str, Tensor]:
        """What channels that go give on average to every output [O] of what reads them, by its name."""
        architecture, stay = self._architecture, query_channels(widths(block, self._architecture), ranking.kept.groups)
        readers = {
            attention_output(architecture): stay,
            neuron_output(architecture): torch.tensor(ranking.kept.neurons),
        }
        biases = {}
        for name, channels in readers.items():
            means = ranking.means[name]
            if channels.numel() < means.numel() and name in self._biased:
                gone = means.clone()
                gone[channels] = 0.0
                weight = block.get_submodule(name).weight
                biases[name] = weight @ gone.to(weight.device)
        return biases

    def compress_group(
        self, index: int, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None
    ) -> Mapping[str, nn.Module]:
        """Refit what writes to the residual stream, once something before its output is gone; all else is as it is stored."""
        refits = self._config.compensation == LEAST_SQUARES and index >= self._first_narrowed
        if not refits or statistics is None or statistics.num_corrected == 0:
            return linears
        return {name: self._refitted(name, linear, statistics) for name, linear in linears.items()}

    def finish_block(self, index: int, block: nn.Module, data: BlockData | None) -> dict[str, object]:
        """The block's report."""
        linears = {name: block.get_submodule(name) for name in self._architecture.linears}
        new = [linear for name, linear in linears.items() if name not in self._had_bias and linear.bias is not None]
        return {
            "index": index,
            **self._report,
            "linear_parameters": sum(linear.weight.numel() for linear in linears.values()),
            "new_biases": sum(linear.bias.numel() for linear in new),
            "cpu_seconds": time.process_time() - self._started,
        }

    def freeze_block(self, block: nn.Module) -> dict[str, Tensor]:
        """The block's tensors in float16, the values that it has already."""
        return {name: to_storage(parameter.detach(), name) for name, parameter in block.named_parameters()}

    def restore_block(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """A narrow block of the stored values, in float32."""
        fill_narrowed(block, {name: tensor.float() for name, tensor in tensors.items()}, self._architecture)

    def _refitted(self, name: str, linear: nn.Linear, statistics: InputStatistics) -> nn.Module:
        before = linear.weight.detach().float()
        if name in self._biased:
            weight, bias = statistics.refitted(before, self._config.ridge)
            bias = bias if linear.bias is None else bias + linear.bias
        else:
            weight, bias = statistics.refitted(before, self._config.ridge, affine=False)[0], linear.bias
        stored = None if bias is None else to_storage(bias, f"{name}.bias").float()
        return linear_of(to_storage(weight, f"{name}.weight").float(), stored)


def _bits(reports: Sequence[Mapping[str, object]], original: int) -> Mapping[str, float]:
    """Bits of what is left of the linears, beside the number of weights that they had."""
    weights, biases = (sum(int(str(report[name])) for report in reports) for name in ("linear_parameters", "new_biases"))
    return {"weights": 16.0 * weights, **({"biases": 16.0 * biases} if biases else {}), "parameters": float(original)}
