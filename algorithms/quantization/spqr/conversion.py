"""SpQR's exports: decoded weights, our packed layout, the tiles of SpQR's own kernel, and plain codes where they are that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from algorithms.blockwise import uniform_exports
from algorithms.blockwise.pipeline import linear_shapes, linears_of
from algorithms.blockwise.stages import Exporter, open_checkpoint, read_json
from algorithms.blockwise.uniform_exports import Setting
from algorithms.formats import compressed_tensors, gptq
from algorithms.formats.checkpoint import Calibrated, write_checkpoint, write_dense
from algorithms.formats.spqr import packed as spqr
from algorithms.formats.spqr import tiles as spqr_tiles
from algorithms.modeling.families.kept import kept_linears
from algorithms.modeling.source import ModelSource
from algorithms.numerics.sparse_quantized import SparseQuantized
from algorithms.quantization.spqr.config import SpqrConfig
from algorithms.quantization.spqr.weight import as_uniform

FORMATS = ("dense", "spqr", "spqr-tiles", "compressed-tensors", "gptq")
_PLAIN_CODES = ("compressed-tensors", "gptq")
_TILE_WORDS = ".dense_weights"


def check_exports(config: SpqrConfig, exports: Sequence[str], source: ModelSource) -> None:
    """Refuse formats that cannot hold what the recipe asks for.

    Raises:
        ValueError: names every such format, with its reason.
    """
    reasons = {name: _refusal(name, config) for name in exports}
    if "gptq" in exports and reasons["gptq"] is None:
        reasons["gptq"] = gptq.shape_refusal(linear_shapes(source))
    if "compressed-tensors" in exports and reasons["compressed-tensors"] is None:
        reasons["compressed-tensors"] = compressed_tensors.class_refusal(linears_of(source))
    said = [f"EXPORT: {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    if said:
        raise ValueError("\n".join([*said, "EXPORT: [dense] and [spqr] hold every setting."]))


def exporters(config: SpqrConfig) -> Mapping[str, Exporter]:
    """The writer of every format."""
    return {
        "dense": partial(write_dense, dense_state=spqr.dense_state),
        "spqr": partial(_write_packed, config=config),
        "spqr-tiles": _write_tiles,
        "compressed-tensors": partial(_write_plain, name="compressed-tensors", config=config),
        "gptq": partial(_write_plain, name="gptq", config=config),
    }


def read_export(directory: Path) -> nn.Module:
    """A folder in any of the formats as a float32 model, read by our own unpacking."""
    settings = read_json(directory / "config.json").get("quantization_config")
    if settings is None:
        return open_checkpoint(directory, dict)
    if settings["quant_method"] == "bitpress-spqr":
        return open_checkpoint(directory, spqr.dense_state)
    if settings["quant_method"] == "spqr":
        return _read_tiles(directory)
    return uniform_exports.read_export(directory)


def _setting(config: SpqrConfig) -> Setting:
    return Setting(
        bits=config.bits,
        symmetric=config.symmetric,
        group_size=config.group_size,
        has_column_groups=config.permutation_order != "identity" and config.group_size != -1,
    )


def _refusal(name: str, config: SpqrConfig) -> str | None:
    setting = _setting(config)
    if name == "spqr-tiles":
        if config.round_zero:
            return "SpQR's kernel has zeros of two levels, which lie between codes; set round_zero: false."
        plain = config.scale_bits or 16, config.zero_bits or 16
        return spqr_tiles.refusal(
            bits=setting.bits, symmetric=setting.symmetric, group_size=setting.group_size,
            has_column_groups=setting.has_column_groups, scale_bits=plain[0], zero_bits=plain[1], run=config.run,
        )  # fmt: skip
    if name not in _PLAIN_CODES:
        return None
    if config.outlier_threshold is not None or config.target_bits is not None:
        return "it has no place for outliers; outlier_threshold: null makes none."
    if config.scale_bits is not None:
        return "it stores scales in 16 bits; qq_scale_bits: null keeps them so."
    if not config.symmetric and (not config.round_zero or config.zero_bits is not None):
        return "it stores whole zeros; sym: true, or round_zero: true with qq_zero_bits: null, makes them so."
    if setting.has_column_groups and name == "compressed-tensors":
        return "it reads groups of neighbouring columns; permutation_order: identity makes them so."
    return setting.refusal(name)


def _repacked(tensors: Mapping[str, Tensor], pack: Callable[[SparseQuantized, str], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    packed = spqr.packed_linears(list(tensors))
    inside = {f"{prefix}.{part}" for prefix in packed for part in spqr.linear_parts(tensors, prefix)}
    state = {name: tensor for name, tensor in tensors.items() if name not in inside}
    for prefix in packed:
        state |= pack(spqr.unpack(tensors, prefix), prefix)
    return state


def _write_packed(calibrated: Calibrated, directory: Path, config: SpqrConfig) -> None:
    settings = spqr.quantization_config(
        bits=config.bits, group_size=config.group_size, kept_modules=kept_linears(calibrated.source)
    )
    write_checkpoint(calibrated, directory, dict, settings)


def _write_tiles(calibrated: Calibrated, directory: Path) -> None:
    packed: dict[str, Tensor] = {}  # by shape alone: the config names the length of every packed tensor
    for index, tensors in calibrated.blocks():
        prefix = calibrated.source.block_prefix(index)
        for linear in spqr.packed_linears(list(tensors)):
            tiles = spqr_tiles.pack(spqr.unpack(tensors, linear), linear)
            packed |= {prefix + name: tensor.to("meta") for name, tensor in tiles.items()}
    settings = spqr_tiles.quantization_config(tensors=packed, kept_modules=kept_linears(calibrated.source))
    write_checkpoint(calibrated, directory, partial(_repacked, pack=spqr_tiles.pack), settings)


def _read_tiles(directory: Path) -> nn.Module:
    skeleton = ModelSource(directory).skeleton()

    def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed = [name.removesuffix(_TILE_WORDS) for name in tensors if name.endswith(_TILE_WORDS)]
        inside = {f"{prefix}.{part}" for prefix in packed for part in ("dense_weights", "row_offsets", "col_vals", "in_perm")}
        state = {name: tensor for name, tensor in tensors.items() if name not in inside}
        for prefix in packed:
            rows, columns = skeleton.get_submodule(prefix).weight.shape
            state[f"{prefix}.weight"] = spqr_tiles.unpack(tensors, prefix, (rows, columns)).dequantize()
        return state

    return open_checkpoint(directory, _dense)


def _write_plain(calibrated: Calibrated, directory: Path, name: str, config: SpqrConfig) -> None:
    setting, kept = _setting(config), kept_linears(calibrated.source)
    if name == "compressed-tensors":
        settings = compressed_tensors.quantization_config(bits=setting.bits, group_size=setting.group_size, kept_modules=kept)
        pack: Callable[..., Mapping[str, Tensor]] = compressed_tensors.pack
    else:
        settings = gptq.quantization_config(
            bits=setting.bits, group_size=setting.group_size, symmetric=setting.symmetric,
            column_groups=setting.has_column_groups, kept_modules=kept,
        )  # fmt: skip
        pack = gptq.pack
    write_checkpoint(
        calibrated, directory, partial(_repacked, pack=lambda weight, prefix: pack(as_uniform(weight), prefix)), settings
    )
