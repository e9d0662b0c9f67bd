"""The stages of AQLM: what each reads, does and leaves on disk."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from algorithms.base import Artifact, StageContext
from algorithms.blockwise import stages as blockwise
from algorithms.formats.aqlm import dense_state, quantization_config
from algorithms.formats.checkpoint import Calibrated, write_checkpoint, write_dense
from algorithms.modeling.families.kept import kept_linears
from algorithms.quantization.aqlm.calibration import AqlmCompressor
from algorithms.quantization.aqlm.config import CalibrationConfig

CALIBRATED = "aqlm-calibration"
CONVERTED = "aqlm-conversion"


def calibrate(context: StageContext, config: CalibrationConfig) -> Artifact:
    """Compress every block in order; see :func:`algorithms.blockwise.stages.calibrate`."""
    source = context.source.with_attention(config.attn_implementation)
    how = blockwise.Calibration(
        name="AQLM",
        kind=CALIBRATED,
        follows_original=config.targets == "original",
        sequential=config.true_sequential,
        min_expert_tokens=config.min_expert_tokens,
        sequence_length=config.sequence_length,
        dtype=config.dtype,
        offload=config.offload_activations,
        facts=lambda reports: codebook_sizes(config),
    )
    compressor = AqlmCompressor(config, source.architecture.linears, context.ranks)
    return blockwise.calibrate(context, source, compressor, how)


def convert(context: StageContext, artifact: Artifact, config: CalibrationConfig, exports: Sequence[str]) -> Artifact:
    """Write the calibrated model in each format: the first into the output folder, the others into ``exports/<format>``."""
    exporters = {"aqlm": partial(_write_aqlm, config=config), "dense": partial(write_dense, dense_state=dense_state)}
    return blockwise.convert(context, artifact, kind=CONVERTED, exports=exports, exporters=exporters)


def open_calibrated(calibrated: Path) -> nn.Module:
    """The calibrated model in float32, with the float16 values that are stored, read block by block when it computes."""
    return blockwise.open_calibrated(calibrated, dense_state)


def open_converted(directory: Path) -> nn.Module:
    """A checkpoint in the AQLM or the dense layout as a float32 model, read without any client."""
    return blockwise.open_checkpoint(directory, dense_state)


def codebook_sizes(config: CalibrationConfig) -> dict[str, int]:
    """What a reader of the folder must know of the recipe."""
    return {
        "num_codebooks": config.num_codebooks,
        "nbits_per_codebook": config.bits_per_codebook,
        "in_group_size": config.in_group_size,
        "out_group_size": config.out_group_size,
    }


def _write_aqlm(calibrated: Calibrated, directory: Path, config: CalibrationConfig) -> None:
    settings = quantization_config(
        num_codebooks=config.num_codebooks,
        bits=config.bits_per_codebook,
        group_shape=(config.out_group_size, config.in_group_size),
        kept_modules=kept_linears(calibrated.source),
    )
    write_checkpoint(calibrated, directory, dict, settings)
