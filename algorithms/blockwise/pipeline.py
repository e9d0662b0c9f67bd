"""The two stages of a method with codes, calibration and conversion, put together from what its plugin brings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

from torch import nn

from algorithms.base import Artifact, StageContext, StageSpec, TokenRequest
from algorithms.blockwise import stages
from algorithms.blockwise.coded import CodedCompressor, Method, Weight
from algorithms.blockwise.config import BlockwiseParameters
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.workload import ModelShapes, Workload

BITS = "bits_report.json"
# Correcting a layer towards the original model is a regression with as many unknowns an output as there are inputs; more tokens
# cost forwards of the original model and gain little (GPTQ's README compares this with all tokens).
_TOKENS_PER_INPUT = 24


@dataclass(frozen=True, kw_only=True)
class Pipeline(Generic[Weight]):
    """A method with codes.

    ``config`` holds the keys of the recipe, ``method`` the mathematics, ``version`` changes with it. ``exporters`` write a
    calibration as each format, which depends on ``export_settings`` beside the calibration; ``read_export`` reads a folder of
    the first format back, without its client. ``needs_text`` is false where nothing of the result depends on data.
    ``method_for`` gives the method for a model in whose blocks it treats linears of some places in another way. ``view`` is the
    model that is compressed, seen from that of the job: the same function with other weights. ``extras`` are further files of
    the output, name -> JSON, from the calibration's folder.
    """

    config: BlockwiseParameters
    method: Method[Weight]
    exports: Sequence[str]
    exporters: Mapping[str, stages.Exporter]
    read_export: Callable[[Path], nn.Module]
    needs_text: bool = True
    export_settings: Mapping[str, object] = field(default_factory=dict)
    version: int = 1
    method_for: Callable[[ModelArchitecture], Method[Weight]] | None = None
    view: Callable[[ModelSource], ModelSource] = lambda source: source
    extras: Callable[[Path], Mapping[str, object]] = lambda calibrated: {}

    @property
    def calibrated_kind(self) -> str:
        """Marks what the calibration leaves."""
        return f"{self.method.name}-calibration"

    def specs(self) -> tuple[StageSpec, ...]:
        """Both stages, with the settings that shape each."""
        config = self.config
        request = TokenRequest(
            num_samples=config.num_samples,
            sequence_length=config.sequence_length,
            seed=config.seed,
            validation_samples=config.held_out,
        )
        return (
            StageSpec(
                name="calibration",
                run=self._calibrate,
                directory="calibration",
                kind=self.calibrated_kind,
                settings=config.shaping,
                tokens=request if self.needs_text else None,
                distributed=self.needs_text,
                reuse_on_new_data=True,
                version=self.version,
            ),
            StageSpec(
                name="conversion",
                run=self._convert,
                directory="converted",
                kind=f"{self.method.name}-conversion",
                settings={"exports": list(self.exports), **self.export_settings},
            ),
        )

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """The walk over the blocks, with block tuning where the recipe has it; without text there is none to speak of."""
        tuning, shapes = self.config.block_tuning, ModelShapes.of(source)
        epochs = 0 if tuning is None else tuning.max_epochs
        sweeps = 2.0 * shapes.blocks * shapes.block_parameters * shapes.hidden
        return {"calibration": shapes.walk(tokens.get("calibration", 0), tuning_epochs=epochs).plus(sweeps)}

    def open(self, artifact: Artifact) -> nn.Module:
        """A calibration or an export as a float32 model that reads its blocks when they compute."""
        if artifact.kind == self.calibrated_kind:
            return stages.open_calibrated(artifact.directory, self.method.dense_state)
        return self.read_export(artifact.directory)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits by component over all compressed linears, and ``parameters``, the number of weights they hold."""
        if artifact.kind == self.calibrated_kind:
            return stages.facts(artifact.directory)["bits"]
        return stages.read_json(artifact.directory / BITS)

    def _calibrate(self, context: StageContext, _artifact: Artifact) -> Artifact:
        config = self.config
        source = self.view(context.source.with_attention(config.attn_implementation))
        method = self.method if self.method_for is None else self.method_for(source.architecture)
        compressor = CodedCompressor(
            method, source.architecture, tuning=config.block_tuning, seed=config.seed, ranks=context.ranks
        )
        how = stages.Calibration(
            name=self.method.name,
            kind=self.calibrated_kind,
            follows_original=config.targets == "original",
            reference_sequences=followed_sequences(config, source, tunes=config.block_tuning is not None),
            sequential=config.true_sequential,
            min_expert_tokens=config.min_expert_tokens,
            sequence_length=config.sequence_length,
            dtype=config.dtype,
            offload=config.offload_activations,
            facts=lambda reports: {"bits": {**total_bits(reports), **_added(context.source, source)}},
        )
        return stages.calibrate(context, source, compressor, how)

    def _convert(self, context: StageContext, artifact: Artifact) -> Artifact:
        for name, value in {BITS: self.bits(artifact), **self.extras(artifact.directory)}.items():
            atomic_write_json(context.output_dir / name, value)
        kind = f"{self.method.name}-conversion"
        return stages.convert(context, artifact, kind=kind, exports=self.exports, exporters=self.exporters)


def followed_sequences(config: BlockwiseParameters, source: ModelSource, *, tunes: bool) -> int | None:
    """Sequences whose original hidden states are followed; None for all, of which block tuning makes its targets."""
    if tunes or config.reference_samples is not None:
        return None if tunes else config.reference_samples
    widest = max(columns for _, columns in linear_shapes(source).values())
    return -(-_TOKENS_PER_INPUT * widest // config.sequence_length)


def linears_of(source: ModelSource) -> dict[str, nn.Linear]:
    """A linear of every name that is compressed, to be looked at."""
    return {name: source.linear_like(name) for name in source.architecture.linears}


def linear_shapes(source: ModelSource) -> dict[str, tuple[int, int]]:
    """Rows and columns of every compressed linear of a block, by name."""
    shapes = {name: linear.weight.shape for name, linear in linears_of(source).items()}
    return {name: (rows, columns) for name, (rows, columns) in shapes.items()}


def check_groups(source: ModelSource, group_size: int, key: str) -> None:
    """Every linear's columns must be a whole number of groups.

    Raises:
        ValueError: lists all linears that are not, and names the ``key``.
    """
    shapes = linear_shapes(source).items()
    wrong = [f"{name} [{rows}, {columns}]" for name, (rows, columns) in shapes if columns % group_size]
    if group_size > 0 and wrong:
        common = math.gcd(*(columns for _, (_, columns) in shapes))
        fits = max(size for size in range(1, min(group_size, common) + 1) if common % size == 0)
        raise ValueError(
            f"{key}: groups of {group_size} columns do not divide {', '.join(wrong)}; {fits} divides all, -1 takes whole rows."
        )


def _added(original: ModelSource, viewed: ModelSource) -> Mapping[str, int]:
    """Bits of parameters that a view of a model has beyond the model's own."""
    added = viewed.num_parameters - original.num_parameters
    return {"added": 16 * added} if added else {}


def total_bits(reports: Sequence[Mapping[str, object]]) -> Mapping[str, float]:
    """Stored bits by component of all linears in blocks' reports, and ``parameters``, the number of weights they hold."""
    totals: Counter[str] = Counter()
    for report in reports:
        linears = report["linears"]
        assert isinstance(linears, Mapping)
        for linear in linears.values():
            totals.update(linear["bits"])
    return dict(totals)
