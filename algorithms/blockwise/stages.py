"""The stages that every block-wise method shares: calibrate block by block, then export; and reading back what they left.

A plugin brings its :class:`BlockCompressor` and the formats it can write; the rest of its stages is here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext
from algorithms.finetuning.distillation.stage import clear
from algorithms.formats.checkpoint import OUTSIDE, Calibrated, DenseState
from algorithms.formats.storage import to_storage
from algorithms.modeling.activations import embed
from algorithms.modeling.block_loop import BlockCompressor, Streams, compress_blockwise
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.companions import copy_companions
from algorithms.modeling.files import atomic_save_tensors, atomic_write_json, folder_digest
from algorithms.modeling.on_demand import folder_on_demand, on_demand, resident
from algorithms.modeling.source import ModelSource

TOKENS_PER_BATCH = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How a method walks through a model.

    ``name`` is shown to the user, ``kind`` marks the artifact. ``follows_original`` takes targets from the original model's own
    hidden states, for ``reference_sequences`` of the sequences (None: all, as block tuning needs them); ``sequential`` gathers
    statistics group by group. Hidden states are kept in ``dtype``, on the CPU with ``offload``. ``facts`` makes of all blocks'
    reports what a reader of the folder must know, for calibration.json. ``min_expert_tokens``: see
    :func:`algorithms.modeling.mixtures.routing.count_routed`.
    """

    name: str
    kind: str
    follows_original: bool
    reference_sequences: int | None = None
    sequential: bool
    sequence_length: int
    dtype: str = "auto"
    offload: bool = True
    min_expert_tokens: int | None = None
    facts: Callable[[Sequence[Mapping[str, object]]], Mapping[str, object]] = lambda reports: {}


def calibrate(context: StageContext, source: ModelSource, compressor: BlockCompressor, how: Calibration) -> Artifact:
    """Compress every block in order; finished blocks in the output folder are taken as they are. No tokens, no use of data.

    Ranks share out the sequences, and with them the forwards, the statistics and the tuning; rank 0 writes.

    Leaves ``<block>.safetensors`` and ``<block>.json`` for every block, ``not_quantized_weights.safetensors``, the source's
    config.json and tokenizer files, and calibration.json with ``facts`` and the report of every block.
    """
    directory, ranks = context.output_dir, context.ranks
    if ranks.is_main:
        write_outside(source, directory, source.tensors(source.outside_names()))
    reports: list[Mapping[str, object]] = []
    with context.progress(f"{how.name} calibration", source.num_blocks) as advance:

        def _on_block(index: int, report: Mapping[str, object]) -> None:
            reports.append(report)
            context.metrics({"event": "block", "stage": "calibration", **report})
            advance(_note(index, report))

        compress_blockwise(
            source,
            compressor,
            _streams(context, source, how) if context.tokens else None,
            store=BlockStore(directory),
            sequential=how.sequential,
            device=context.device,
            on_block=_on_block,
            ranks=ranks,
            min_expert_tokens=how.min_expert_tokens,
        )
    digest = ""
    if ranks.is_main:
        atomic_write_json(directory / "calibration.json", {**how.facts(reports), "blocks": reports})
        digest = folder_digest(directory)
    ranks.meet()
    return Artifact(kind=how.kind, directory=directory, digest=ranks.from_main(digest))


def facts(calibrated: Path) -> Mapping[str, Any]:
    """What calibration.json says of a calibration folder."""
    return read_json(calibrated / "calibration.json")


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


Exporter = Callable[[Calibrated, Path], None]


def convert(
    context: StageContext, artifact: Artifact, *, kind: str, exports: Sequence[str], exporters: Mapping[str, Exporter]
) -> Artifact:
    """Write the calibrated model in each format: the first into the output folder, the others into ``exports/<format>``."""
    calibrated = Calibrated(artifact.directory)
    for place, name in enumerate(exports):
        directory = context.output_dir if place == 0 else context.output_dir / "exports" / name
        directory.mkdir(parents=True, exist_ok=True)
        exporters[name](calibrated, directory)
    return Artifact(kind=kind, directory=context.output_dir, digest=folder_digest(context.output_dir))


def open_calibrated(directory: Path, dense_state: DenseState) -> nn.Module:
    """A calibrated model with the values that are stored, in float32, read block by block when it computes.

    ``dense_state`` decodes the tensors of one block.
    """
    calibrated = Calibrated(directory)
    return on_demand(calibrated.source, calibrated.outside(), lambda index: dense_state(calibrated.block(index)))


def open_checkpoint(directory: Path, dense_state: DenseState) -> nn.Module:
    """An exported checkpoint, read without any client, block by block when it computes."""
    return folder_on_demand(ModelSource(directory), dense_state)


def load_calibrated(directory: Path, dense_state: DenseState) -> nn.Module:
    """What :func:`open_calibrated` opens, in memory."""
    return resident(open_calibrated(directory, dense_state))


def load_checkpoint(directory: Path, dense_state: DenseState) -> nn.Module:
    """What :func:`open_checkpoint` opens, in memory."""
    return resident(open_checkpoint(directory, dense_state))


def round_to_storage(block: nn.Module, compressed: Sequence[str]) -> None:
    """Give everything in a block but the weights of ``compressed`` linears the values that will be stored."""
    weights = {f"{name}.weight" for name in compressed}
    for name, parameter in block.named_parameters():
        if name not in weights:
            parameter.data = to_storage(parameter.data, name).to(parameter.dtype)


def _streams(context: StageContext, source: ModelSource, how: Calibration) -> Streams:
    followed, others = _spread(context.tokens, how.reference_sequences)
    reference, rest, validation = embed(
        source,
        [context.ranks.mine(sequences) for sequences in (followed, others, context.validation_tokens)],
        batch_size=max(1, TOKENS_PER_BATCH // how.sequence_length),
        device=context.device,
        offload=how.offload,
        dtype=torch.float32 if how.dtype == "auto" else getattr(torch, how.dtype),
    )
    return Streams(
        training=replace(reference, batches=[*reference.batches, *rest.batches]),
        validation=validation,
        reference=(reference, validation.copy()) if how.follows_original else None,
    )


def _spread(sequences: Sequence[Tensor], count: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """So many of the sequences at even distances, and the others."""
    if count is None or count >= len(sequences):
        return list(sequences), []
    chosen = {place * len(sequences) // count for place in range(count)}
    return [sequences[place] for place in sorted(chosen)], [s for place, s in enumerate(sequences) if place not in chosen]


def write_outside(source: ModelSource, directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """What of a calibration's folder belongs to no block: ``tensors`` as they are stored, and the small files of ``source``."""
    atomic_save_tensors(directory / OUTSIDE, {name: to_storage(tensor, name) for name, tensor in tensors.items()})
    copy_companions(source.directory, directory)
    atomic_write_json(directory / "config.json", source.raw_config())


def hand_on(calibrated: Calibrated, directory: Path) -> None:
    """A calibration once more, as it is, in another folder."""
    store = BlockStore(directory)
    for index, tensors in calibrated.blocks():
        store.save(index, tensors, {"index": index})
    write_outside(calibrated.source, directory, calibrated.outside())


def tune_calibrated(
    context: StageContext, artifact: Artifact, tune: Callable[[], None], *, kind: str, report: str, name: str
) -> Artifact:
    """What a stage does around the tuning of a whole calibrated model, on every rank: nothing where it was done already.

    Args:
        context: of the stage.
        artifact: what is tuned.
        tune: leaves the layout of a calibration in the output folder, and ``report``, its last file.
        kind: marks the result.
        report: a file that says it is all there; one of a result that has been damaged since is removed first.
        name: shown to the user.
    """
    ranks, directory = context.ranks, context.output_dir
    finished = ranks.is_main and is_complete(directory, report, context.source.num_blocks, artifact.directory)
    ranks.meet()
    if ranks.from_main(finished):
        logger.info("%s was stopped after its last file; there is nothing left to do", name)
    else:
        if ranks.is_main:
            (directory / report).unlink(missing_ok=True)
        tune()
    digest = ""
    if ranks.is_main:
        clear(directory)
        digest = folder_digest(directory)
    ranks.meet()
    return Artifact(kind=kind, directory=directory, digest=ranks.from_main(digest))


def is_complete(directory: Path, report: str, num_blocks: int, given: Path) -> bool:
    """Whether a folder in the layout of a calibration has everything, its ``report``, which is written last, included.

    The small files are those of ``given``, the folder it was made from, and copied anew: one may have been damaged since.
    """
    if not all((directory / name).is_file() for name in (report, OUTSIDE, "config.json")):
        return False
    copy_companions(given, directory)
    store = BlockStore(directory)
    return all(store.load(index) is not None for index in range(num_blocks))


def _note(index: int, report: Mapping[str, object]) -> str:
    error = report.get("output_error")
    return f"block {index + 1}" + (f", output error {error:.2%}" if isinstance(error, float) else "")
