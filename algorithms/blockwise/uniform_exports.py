"""Uniform codes in every format whose clients read them: which format can hold a setting, its writer and its reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from algorithms.blockwise.pipeline import linear_shapes, linears_of
from algorithms.blockwise.stages import Exporter, open_checkpoint, read_json
from algorithms.formats import awq, compressed_tensors, gptq, uniform
from algorithms.formats.checkpoint import Calibrated, write_checkpoint, write_dense
from algorithms.formats.gguf import file as gguf
from algorithms.modeling.companions import copy_companions
from algorithms.modeling.families.kept import kept_linears
from algorithms.modeling.source import ModelSource
from algorithms.numerics.uniform import UniformCodes

FORMATS = ("compressed-tensors", "gptq", "auto-round", "awq", "gguf", "dense")

_REFUSALS: Mapping[str, Callable[..., str | None]] = {
    "compressed-tensors": compressed_tensors.refusal,
    "gptq": gptq.refusal,
    "auto-round": gptq.auto_round_refusal,
    "awq": awq.refusal,
    "gguf": gguf.refusal,
}
_ROUNDS_ACTIVATIONS = ("compressed-tensors",)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides how codes can be stored. ``group_size`` -1 is the whole row; ``has_column_groups``: see UniformCodes.

    ``activation_bits`` are those to which inputs of linears are rounded, token by token; None where they stay as they are.
    ``awq_version`` is the layout within AWQ's, of :data:`algorithms.formats.awq.VERSIONS`. ``spelling`` has pairs of words:
    what refusals say, which is GPTQ's keys, and what the recipe has for it.
    """

    bits: int
    symmetric: bool
    group_size: int
    has_column_groups: bool = False
    activation_bits: int | None = None
    awq_version: str = "gemm"
    spelling: tuple[tuple[str, str], ...] = ()

    def refusal(self, name: str) -> str | None:
        """Why a format cannot hold codes of this setting, in a sentence; None where it can."""
        if name not in _REFUSALS:
            return None
        if self.activation_bits is not None and name not in _ROUNDS_ACTIVATIONS:
            return (
                f"its readers have no way to round activations to {self.activation_bits} bits: they would serve another model "
                "than the one that is evaluated."
            )
        reason = _REFUSALS[name](
            bits=self.bits,
            symmetric=self.symmetric,
            group_size=self.group_size,
            has_column_groups=self.has_column_groups,
        )
        for word, ours in self.spelling if reason is not None else ():
            reason = reason.replace(word, ours)
        return reason

    def first_format(self, formats: Sequence[str] = FORMATS) -> str:
        """The first of the formats that can hold the codes; ``dense`` holds any."""
        return next(name for name in formats if self.refusal(name) is None)


def check_exports(setting: Setting, exports: Sequence[str], source: ModelSource) -> None:
    """Refuse formats that cannot hold what the recipe asks for.

    Raises:
        ValueError: names every such format, with its reason.
    """
    reasons = {name: setting.refusal(name) for name in exports}
    if "gguf" in exports and reasons["gguf"] is None:
        reasons["gguf"] = gguf.architecture_refusal(source.raw_config())
    if "compressed-tensors" in exports:
        reasons["compressed-tensors"] = reasons["compressed-tensors"] or compressed_tensors.class_refusal(linears_of(source))
    for name in {"gptq", "auto-round"} & reasons.keys():
        reasons[name] = reasons[name] or gptq.shape_refusal(linear_shapes(source))
    if "awq" in exports:
        reasons["awq"] = reasons["awq"] or _awq_shape_refusal(setting.awq_version, linear_shapes(source))
    said = [f"EXPORT: {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if said:
        raise ValueError("\n".join([*said, "EXPORT: [dense] holds every setting."]))


def _awq_shape_refusal(version: str, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why matrices of these shapes cannot be written in a version of AWQ's layout, and which version has a place for them."""
    reason = awq.shape_refusal(shapes, version)
    fitting = [other.upper() for other in awq.VERSIONS if awq.shape_refusal(shapes, other) is None]
    return f"{reason} VERSION: {fitting[0]} has a place for them." if reason is not None and fitting else reason


def exporters(setting: Setting) -> Mapping[str, Exporter]:
    """The writer of every format."""
    return {
        "compressed-tensors": partial(_write_compressed_tensors, setting=setting),
        "gptq": partial(_write_gptq, setting=setting),
        "auto-round": partial(_write_auto_round, setting=setting),
        "awq": partial(_write_awq, setting=setting),
        "gguf": _write_gguf,
        "dense": partial(write_dense, dense_state=uniform.dense_state),
    }


def read_export(directory: Path) -> nn.Module:
    """A folder in any of the formats as a float32 model; all but GGUF are read by our own unpacking."""
    if (directory / gguf.FILE_NAME).is_file():
        return AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf.FILE_NAME, dtype=torch.float32)
    settings = read_json(directory / "config.json").get("quantization_config")
    if settings is None:
        return open_checkpoint(directory, dict)
    if settings["quant_method"] == "compressed-tensors":
        bits = settings["config_groups"]["group_0"]["weights"]["num_bits"]
        unpack = partial(compressed_tensors.unpack, bits=bits)
        return open_checkpoint(directory, partial(_decoded, key="weight_packed", unpack=unpack))
    if settings["quant_method"] == "awq":
        unpack = partial(awq.unpack, group_size=settings["group_size"], version=settings["version"])
        return open_checkpoint(directory, partial(_decoded, key="qweight", unpack=unpack))
    offset = gptq.FIRST_VERSION
    if settings["quant_method"] == "auto-round":
        offset = gptq.auto_round_zero_offset(settings["sym"])
    unpack = partial(gptq.unpack, bits=settings["bits"], zero_offset=offset)
    return open_checkpoint(directory, partial(_decoded, key="qweight", unpack=unpack))


_PARTS = ("weight_packed", "weight_scale", "weight_shape", "qweight", "qzeros", "scales", "g_idx")


def _decoded(
    tensors: Mapping[str, Tensor], key: str, unpack: Callable[[Mapping[str, Tensor], str], UniformCodes]
) -> dict[str, Tensor]:
    packed = [name.removesuffix(f".{key}") for name in tensors if name.endswith(f".{key}")]
    inside = {f"{prefix}.{part}" for prefix in packed for part in _PARTS}
    state = {name: tensor for name, tensor in tensors.items() if name not in inside}
    return state | {f"{prefix}.weight": unpack(tensors, prefix).dequantize() for prefix in packed}


def _repacked(tensors: Mapping[str, Tensor], pack: Callable[[UniformCodes, str], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    state = uniform.rest(tensors)
    for prefix in uniform.packed_linears(list(tensors)):
        state |= pack(uniform.unpack(tensors, prefix), prefix)
    return state


def _write_compressed_tensors(calibrated: Calibrated, directory: Path, setting: Setting) -> None:
    settings = compressed_tensors.quantization_config(
        bits=setting.bits,
        group_size=setting.group_size,
        kept_modules=kept_linears(calibrated.source),
        activation_bits=setting.activation_bits,
    )
    write_checkpoint(calibrated, directory, partial(_repacked, pack=compressed_tensors.pack), settings)


def _write_gptq(calibrated: Calibrated, directory: Path, setting: Setting) -> None:
    settings = gptq.quantization_config(
        bits=setting.bits,
        group_size=setting.group_size,
        symmetric=setting.symmetric,
        column_groups=setting.has_column_groups,
        kept_modules=kept_linears(calibrated.source),
    )
    write_checkpoint(calibrated, directory, partial(_repacked, pack=gptq.pack), settings)


def _write_auto_round(calibrated: Calibrated, directory: Path, setting: Setting) -> None:
    settings = gptq.auto_round_config(
        bits=setting.bits,
        group_size=setting.group_size,
        symmetric=setting.symmetric,
        kept_modules=kept_linears(calibrated.source),
    )
    pack = partial(gptq.pack, zero_offset=gptq.auto_round_zero_offset(setting.symmetric))
    write_checkpoint(calibrated, directory, partial(_repacked, pack=pack), settings)


def _write_awq(calibrated: Calibrated, directory: Path, setting: Setting) -> None:
    settings = awq.quantization_config(
        bits=setting.bits,
        group_size=setting.group_size,
        version=setting.awq_version,
        kept_modules=kept_linears(calibrated.source),
    )
    pack = partial(awq.pack, version=setting.awq_version)
    write_checkpoint(calibrated, directory, partial(_repacked, pack=pack), settings)


def _write_gguf(calibrated: Calibrated, directory: Path) -> None:
    gguf.write(
        directory,
        source_config=calibrated.source.raw_config(),
        tensors=_named(calibrated),
        tokenizer_folder=calibrated.directory if (calibrated.directory / "tokenizer.json").is_file() else None,
    )
    copy_companions(calibrated.directory, directory)


def _named(calibrated: Calibrated) -> Iterator[tuple[str, Tensor | UniformCodes]]:
    """Every tensor of the model by its full name, packed linears as codes under their weight's name."""
    yield from calibrated.outside().items()
    for index, tensors in calibrated.blocks():
        prefix = calibrated.source.block_prefix(index)
        yield from ((prefix + name, tensor) for name, tensor in uniform.rest(tensors).items())
        for name in uniform.packed_linears(list(tensors)):
            yield f"{prefix}{name}.weight", uniform.unpack(tensors, name)
