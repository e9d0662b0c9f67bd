"""The stages of LMQuant for each kind of weights: uniform codes, progressive codes, or float16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from algorithms.base import Artifact
from algorithms.blockwise.coded import Method
from algorithms.blockwise.pipeline import Pipeline
from algorithms.blockwise.stages import Exporter, facts, open_checkpoint, read_json
from algorithms.blockwise.uniform_exports import Setting, read_export
from algorithms.blockwise.uniform_method import tunable, uniform_pipeline
from algorithms.finetuning.learned_rounding import RoundingLinear
from algorithms.formats import plain, progressive, qserve
from algorithms.formats.checkpoint import Calibrated, write_checkpoint, write_dense
from algorithms.formats.plain import PlainWeight
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.rotation import RotatedSource
from algorithms.numerics.grids.progressive import ProgressiveCodes
from algorithms.quantization.lmquant.calibration import Coder, has_exact_products
from algorithms.quantization.lmquant.config import LmquantConfig
from algorithms.quantization.lmquant.serving import Ranges, serving_of
from algorithms.quantization.lmquant.settings import Settings, WeightSetting

NAME = "lmquant"
_SPELLING = (
    ("wbits", "the width of quant.wgts.dtype"),
    ("set groupsize:", "set the columns of quant.wgts.group_shapes to"),
    ("groupsize", "the width of quant.wgts.group_shapes"),
    ("set sym: true", "set quant.wgts.dtype to sintN"),
)
SERVING = "serving.json"  # what a server of the weights rounds besides them


def pipeline_of(config: LmquantConfig, exports: Sequence[str]) -> Pipeline[Any]:
    """The stages of a recipe."""
    settings = config.settings
    coder = Coder(settings)
    weights = settings.weights
    if weights is None:
        pipeline = _plain_pipeline(config, coder, exports)
    elif weights.progressive:
        pipeline = _progressive_pipeline(config, coder, exports)
    else:
        pipeline = uniform_pipeline(
            name=NAME, config=config, fit=coder.fit_uniform, setting=setting_of(settings, weights), exports=exports
        )
        if has_exact_products(weights):  # of which tuned scales would lose some
            pipeline = replace(
                pipeline, method=replace(pipeline.method, tunable=partial(tunable, scales_are_fixed=True), tuned=_with_codes)
            )
    method = replace(pipeline.method, prepare=coder.prepare, serving=serving_of(settings))
    return replace(
        pipeline,
        method=method,
        method_for=lambda architecture: replace(method, fit=partial(method.fit, architecture=architecture)),
        exporters={**pipeline.exporters, "qserve": partial(_write_qserve, settings=settings)},
        read_export=_read_export,
        view=partial(_rotated, settings=settings, seed=config.seed),
        extras=lambda calibrated: {SERVING: _serving_facts(settings, calibrated)},
    )


def setting_of(settings: Settings, weights: WeightSetting) -> Setting:
    """What decides which formats can hold uniform codes."""
    return Setting(
        bits=weights.bits,
        symmetric=weights.symmetric,
        group_size=weights.group_size,
        activation_bits=None if settings.inputs is None else settings.inputs.bits,
        spelling=_SPELLING,
    )


def cache_ranges(artifact: Artifact) -> list[Ranges | None]:
    """The largest query, key and value of every block, None where the calibration did not look for them.

    Args:
        artifact: a calibration, what it was converted to, or a further export in that.
    """
    directory = artifact.directory
    if artifact.kind == f"{NAME}-calibration":
        found = _block_ranges(directory)
    else:
        place = next(place for place in (directory, *directory.parents[:2]) if (place / SERVING).is_file())
        found = read_json(place / SERVING)["cache_ranges"]
    return [None if entry is None else (entry["queries"], entry["keys"], entry["values"]) for entry in found]


def _block_ranges(calibrated: Path) -> list[Mapping[str, float] | None]:
    return [report.get("cache_ranges") for report in facts(calibrated)["blocks"]]


def _serving_facts(settings: Settings, calibrated: Path) -> Mapping[str, object]:
    serving = serving_of(settings)
    cache = settings.cache
    return {
        "activation_bits": serving.activation_bits,
        "cache": None if cache is None else vars(cache),
        "cache_ranges": _block_ranges(calibrated),
    }


def _rotated(source: ModelSource, settings: Settings, seed: int) -> ModelSource:
    if settings.rotation is None:
        return source
    return RotatedSource(source, random=settings.rotation.random, seed=seed)


def _read_export(directory: Path) -> nn.Module:
    """A folder in any of the formats as a float32 model."""
    config = directory / "config.json"
    quantization = read_json(config).get("quantization_config") if config.is_file() else None
    if quantization is not None and quantization["quant_method"] == qserve.QUANT_METHOD:
        return open_checkpoint(directory, qserve.dense_state)
    return read_export(directory)


def _write_qserve(calibrated: Calibrated, directory: Path, settings: Settings) -> None:
    weights, cache = settings.weights, settings.cache
    assert weights is not None
    described = qserve.quantization_config(
        bits=weights.bits, group_size=weights.group_size, kv_bits=16 if cache is None else cache.bits
    )
    write_checkpoint(calibrated, directory, qserve.repacked, described)


def _progressive_pipeline(config: LmquantConfig, coder: Coder, exports: Sequence[str]) -> Pipeline[ProgressiveCodes]:
    method = Method(
        name=NAME,
        fit=coder.fit_progressive,
        pack=progressive.pack,
        dense_state=progressive.dense_state,
        stored_bits=progressive.stored_bits,
        tunable=_tunable,
        tuned=_with_codes,
        join=ProgressiveCodes.joined,
    )
    dense: Exporter = partial(write_dense, dense_state=progressive.dense_state)
    return Pipeline(config=config, method=method, exports=exports, exporters={"dense": dense}, read_export=_read_export)


def _tunable(weight: ProgressiveCodes, target: Tensor, bias: Tensor | None) -> RoundingLinear:
    """A linear under training; both levels of its scales stay."""
    return RoundingLinear(
        target,
        weight.codes,
        weight.row_scales[:, None] * weight.group_scales.float(),
        weight.zeros.float(),
        bits=weight.bits,
        bias=bias,
        scales_are_fixed=True,
    )


def _with_codes(linear: RoundingLinear, before: Any) -> Any:  # noqa: ANN401 - either kind of codes
    """The stored weight of a tuned linear whose scales stay."""
    return replace(before, codes=linear.current_codes())


def _plain_pipeline(config: LmquantConfig, coder: Coder, exports: Sequence[str]) -> Pipeline[PlainWeight]:
    method = Method(
        name=NAME,
        fit=coder.keep,
        pack=plain.pack,
        dense_state=plain.dense_state,
        stored_bits=plain.stored_bits,
        tunable=_untunable,
        tuned=lambda linear, before: before,
        join=PlainWeight.joined,
    )
    dense: Exporter = partial(write_dense, dense_state=plain.dense_state)
    return Pipeline(config=config, method=method, exports=exports, exporters={"dense": dense}, read_export=_read_export)


def _untunable(weight: PlainWeight, target: Tensor, bias: Tensor | None) -> NoReturn:
    raise ValueError("llm.LMQuant.block_tuning: learned rounding needs codes, and quant.wgts.dtype is null.")
