"""LMQuant: QoQ's W4A8KV4 (arXiv 2405.04532) and its relatives, weights made for rounded activations and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.blockwise.pipeline import check_groups, linear_shapes
from algorithms.blockwise.uniform_exports import check_exports
from algorithms.formats import qserve
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.rotation import RotatedSource
from algorithms.modeling.transforms.serving import Serving
from algorithms.quantization.lmquant.config import LmquantConfig
from algorithms.quantization.lmquant.consistency import qserve_obstacle
from algorithms.quantization.lmquant.pipelines import cache_ranges, pipeline_of, setting_of
from algorithms.quantization.lmquant.serving import check_heads, notes_for, serving_of
from algorithms.quantization.lmquant.settings import Settings
from algorithms.workload import Workload

QSERVE, DENSE = "qserve", "dense"
_SERVED_INPUT_BITS = 8


class Lmquant(CompressionAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "LMQuant"
    formats = LmquantConfig.export_formats

    def __init__(self, config: LmquantConfig, exports: Sequence[str] = ()) -> None:
        self._settings = config.settings
        super().__init__(config, exports or (next(name for name in self.formats if refusal(self._settings, name) is None),))
        self._loads_with_qserve = config.loads_with_qserve
        self._tunes = config.block_tuning is not None
        self._pipeline = pipeline_of(config, self.exports)

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse what the model's shapes do not allow, and formats that cannot hold the recipe's setting.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        weights = self._settings.weights
        if source.architecture.is_inspected:
            raise ValueError(
                f"llm.LMQuant: which linears make queries, keys and values is not known for {source.config.model_type}. Choose "
                "another algorithm, or add a row to algorithms/modeling/families/table.py."
            )
        reason = family_refusal(source.architecture)
        if reason is not None:
            raise ValueError(f"llm.LMQuant: {reason}")
        if "calibration" in stages:
            if weights is not None:
                check_groups(source, weights.group_size, "llm.LMQuant.quant.wgts.group_shapes")
            if self._settings.rotation is not None:
                _checked("llm.LMQuant.quant.enable_rotation", lambda: RotatedSource(source))
            _checked("llm.LMQuant.quant.opts", lambda: check_heads(self._settings, source.config))
            if self._tunes and weights is None:
                raise ValueError("llm.LMQuant.block_tuning: learned rounding needs codes, and quant.wgts.dtype is null.")
        if "conversion" in stages:
            self._check_exports(source)

    def stages(self) -> Sequence[StageSpec]:
        """Calibration and conversion."""
        return self._pipeline.specs()

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Of the calibration; see :meth:`Pipeline.workloads`."""
        return self._pipeline.workloads(source, tokens)

    def open(self, artifact: Artifact) -> nn.Module:
        """A calibration or an export as a float32 model, with activations as they are."""
        return self._pipeline.open(artifact)

    def as_served(self, model: nn.Module, artifact: Artifact, source: ModelSource, client: str | None = None) -> nn.Module:
        """The model with inputs of linears and keys and values rounded; the client of a format rounds inputs, if that."""
        architecture = source.architecture
        serving = serving_of(self._settings)
        if client is not None:
            serving = Serving(activation_bits=serving.activation_bits if client == "compressed-tensors" else None)
        serving.apply(model, architecture.linears, architecture)
        cache = self._settings.cache
        if client is None and cache is not None and cache.static:
            blocks = model.get_submodule(architecture.blocks).children()
            for block, ranges in zip(blocks, cache_ranges(artifact), strict=True):
                serving_of(self._settings, ranges).apply(block, architecture.linears, architecture)
        return model

    def serving_notes(self, output: Path) -> Sequence[str]:
        """What is rounded besides the weights, and the commands that serve it so."""
        return notes_for(self._settings, self.exports, output)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits by component, and the number of compressed weights."""
        return self._pipeline.bits(artifact)

    def _check_exports(self, source: ModelSource) -> None:
        if self._loads_with_qserve and QSERVE not in self.exports:
            raise ValueError("llm.LMQuant.loads_with_qserve: true asks for a format that EXPORT leaves out; add qserve to it.")
        reasons = {name: refusal(self._settings, name) for name in self.exports}
        weights = self._settings.weights
        if QSERVE in self.exports and reasons[QSERVE] is None and weights is not None:
            reasons[QSERVE] = qserve.shape_refusal(linear_shapes(source), weights.group_size, weights.bits)
        said = [f"EXPORT: {name}: {reason}" for name, reason in reasons.items() if reason is not None]
        if said:
            raise ValueError("\n".join([*said, "EXPORT: [dense] holds every setting."]))
        others = [name for name in self.exports if name not in (QSERVE, DENSE)]
        if weights is not None and not weights.progressive and others:
            check_exports(setting_of(self._settings, weights), others, source)


def family_refusal(architecture: ModelArchitecture) -> str | None:
    """Why a family's linears do not have the roles by which QoQ treats them, in a sentence; None where they have."""
    found = [group[0] for group in architecture.input_groups if group != architecture.qkv]
    if len(found) == len(architecture.input_groups):
        return f"{architecture.model_type} has no three linears for queries, keys and values that alone share an input."
    unfed = [leader for leader in found if leader not in {*architecture.input_norms, *architecture.feeders}]
    if architecture.experts is not None or unfed:
        named = ", ".join(unfed[:3]) or architecture.experts
        place = f"{named} in {architecture.model_type}"
        return f"QoQ smooths what a norm or another linear makes, and neither makes the input of {place}."
    return None


def refusal(settings: Settings, name: str) -> str | None:
    """Why a format cannot hold what a recipe's settings make, in a sentence; None where it can."""
    weights, inputs = settings.weights, settings.inputs
    if name == DENSE:
        return None
    if name == QSERVE:
        obstacle = qserve_obstacle(settings)
        return obstacle and f"{obstacle}."
    if weights is None:
        return "its weights are codes, and quant.wgts.dtype is null."
    if weights.progressive:
        return "it has no place for scales in two levels (quant.wgts.group_scale_dtypes), which QServe alone reads."
    if inputs is not None and inputs.bits != _SERVED_INPUT_BITS:
        return f"no server multiplies by inputs of {inputs.bits} bits (quant.ipts.dtype); they multiply by sint8, or null."
    return setting_of(settings, weights).refusal(name)


def _checked(key: str, check: Callable[[], object]) -> None:
    """Run a check; what it refuses is reported at ``key``.

    Raises:
        ValueError: the key, and the check's own words.
    """
    try:
        check()
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
