"""The stages of AQLM: what each reads, does and leaves on disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from algorithms.base import Artifact, StageContext
from algorithms.formats.aqlm import dense_state, quantization_config, to_storage
from algorithms.modeling.activations import embed
from algorithms.modeling.block_loop import Streams, compress_blockwise
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.companions import copy_companions
from algorithms.modeling.files import atomic_save_tensors, atomic_write_json, folder_digest
from algorithms.modeling.shards import ShardWriter
from algorithms.modeling.source import ModelSource
from algorithms.quantization.aqlm.calibration import AqlmCompressor
from algorithms.quantization.aqlm.config import CalibrationConfig

CALIBRATED = "aqlm-calibration"
CONVERTED = "aqlm-conversion"
OUTSIDE = "not_quantized_weights.safetensors"
_TOKENS_PER_BATCH = 2048


def calibrate(context: StageContext, config: CalibrationConfig) -> Artifact:
    """Compress every block in order; finished blocks in the output folder are taken as they are.

    Leaves ``<block>.safetensors`` and ``<block>.json`` for every block, ``not_quantized_weights.safetensors``, the original
    config.json and tokenizer files, and calibration.json with the sizes of the codebooks and the report of every block.
    """
    source = context.source.with_attention(config.attn_implementation)
    _write_outside(source, context.output_dir)
    streams = _streams(context, source, config)
    reports: list[Mapping[str, object]] = []
    with context.progress("AQLM calibration", context.source.num_blocks) as advance:

        def _on_block(index: int, report: Mapping[str, object]) -> None:
            reports.append(report)
            context.metrics({"event": "block", "stage": "calibration", **report})
            advance(_note(index, report))

        compress_blockwise(
            source,
            AqlmCompressor(config),
            streams,
            store=BlockStore(context.output_dir),
            sequential=config.true_sequential,
            on_block=_on_block,
        )
    atomic_write_json(context.output_dir / "calibration.json", {**codebook_sizes(config), "blocks": reports})
    return Artifact(kind=CALIBRATED, directory=context.output_dir, digest=folder_digest(context.output_dir))


def convert(context: StageContext, artifact: Artifact, config: CalibrationConfig, exports: Sequence[str]) -> Artifact:
    """Write the calibrated model in each format: the first into the output folder, the others into ``exports/<format>``."""
    for place, name in enumerate(exports):
        directory = context.output_dir if place == 0 else context.output_dir / "exports" / name
        directory.mkdir(parents=True, exist_ok=True)
        write_checkpoint(artifact.directory, directory, config=config, dense=name == "dense")
    return Artifact(kind=CONVERTED, directory=context.output_dir, digest=folder_digest(context.output_dir))


def write_checkpoint(calibrated: Path, directory: Path, *, config: CalibrationConfig, dense: bool) -> None:
    """A Hugging Face folder from a calibration folder, block by block, config.json last."""
    source = ModelSource(calibrated)
    store = BlockStore(calibrated)
    writer = ShardWriter(directory)
    writer.add(outside_tensors(calibrated))
    for index in range(source.num_blocks):
        tensors, _ = stored_block(store, index)
        if dense:
            tensors = {name: to_storage(tensor, name) for name, tensor in dense_state(tensors).items()}
        writer.add({source.block_prefix(index) + name: tensor for name, tensor in tensors.items()})
    writer.close()
    copy_companions(calibrated, directory)
    settings = {**source.raw_config(), "dtype": "float16", "torch_dtype": "float16"}
    if not dense:
        settings["quantization_config"] = quantization_config(
            num_codebooks=config.num_codebooks,
            bits=config.bits_per_codebook,
            group_shape=(config.out_group_size, config.in_group_size),
            kept_modules=(source.architecture.head,),
        )
    atomic_write_json(directory / "config.json", settings)


def stored_block(store: BlockStore, index: int) -> tuple[dict[str, torch.Tensor], Mapping[str, object]]:
    """A block of a finished calibration.

    Raises:
        ValueError: the block is missing or damaged.
    """
    loaded = store.load(index)
    if loaded is None:
        raise ValueError(
            f"block {index} of {store.directory} is missing or damaged; run the job again with overwrite=[calibration]"
        )
    return loaded


def outside_tensors(calibrated: Path) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and head of a calibration folder."""
    return load_file(calibrated / OUTSIDE)


def load_calibrated(calibrated: Path) -> nn.Module:
    """The calibrated model in float32, with the float16 values that are stored."""
    source = ModelSource(calibrated)
    store = BlockStore(calibrated)
    state = {name: tensor.float() for name, tensor in outside_tensors(calibrated).items()}
    for index in range(source.num_blocks):
        tensors, _ = stored_block(store, index)
        state |= {source.block_prefix(index) + name: tensor for name, tensor in dense_state(tensors).items()}
    return source.model_from(state)


def load_converted(directory: Path) -> nn.Module:
    """A checkpoint in the AQLM or the dense layout as a float32 model, read without any client."""
    source = ModelSource(directory)
    tensors = source.tensors(source.weight_files)
    return source.model_from(dense_state(tensors))


def codebook_sizes(config: CalibrationConfig) -> dict[str, int]:
    """What a reader of the folder must know of the recipe."""
    return {
        "num_codebooks": config.num_codebooks,
        "nbits_per_codebook": config.bits_per_codebook,
        "in_group_size": config.in_group_size,
        "out_group_size": config.out_group_size,
    }


def _streams(context: StageContext, source: ModelSource, config: CalibrationConfig) -> Streams:
    training, validation = embed(
        source,
        (context.tokens, context.validation_tokens),
        batch_size=max(1, _TOKENS_PER_BATCH // config.sequence_length),
        device=context.device,
        offload=config.offload_activations,
        dtype=torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype),
    )
    return Streams(
        training=training,
        validation=validation,
        reference=(training.copy(), validation.copy()) if config.targets == "original" else None,
    )


def _write_outside(source: ModelSource, directory: Path) -> None:
    tensors = {name: to_storage(tensor, name) for name, tensor in source.tensors(source.outside_names()).items()}
    atomic_save_tensors(directory / OUTSIDE, tensors)
    copy_companions(source.directory, directory)
    shutil.copyfile(source.directory / "config.json", directory / "config.json")


def _note(index: int, report: Mapping[str, object]) -> str:
    error = report.get("output_error")
    return f"block {index + 1}" + (f", output error {error:.2%}" if isinstance(error, float) else "")
