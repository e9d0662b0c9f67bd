"""FLAP's third stage, where it is asked for: what is left of the model learns the original's distributions again."""

from __future__ import annotations

import logging
from dataclasses import asdict

from algorithms.base import Artifact, StageContext
from algorithms.blockwise.stages import facts, hand_on, is_complete, write_outside
from algorithms.finetuning.distillation.stage import clear
from algorithms.finetuning.recovery import recover, tensors_below, tensors_outside
from algorithms.finetuning.recovery_config import RecoveryConfig
from algorithms.formats.checkpoint import Calibrated
from algorithms.formats.storage import to_storage
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.files import atomic_write_json, folder_digest
from algorithms.modeling.on_demand import resident
from algorithms.modeling.transforms.narrowing import narrowed_on_demand

logger = logging.getLogger(__name__)

KIND = "flap-recovery"
_FACTS = "calibration.json"


def recover_pruned(context: StageContext, artifact: Artifact, config: RecoveryConfig) -> Artifact:
    """Tune the pruned model; leaves the layout of the pruning, whose calibration.json has the losses of every step as well."""
    ranks, directory = context.ranks, context.output_dir
    finished = ranks.is_main and is_complete(directory, _FACTS, context.source.num_blocks, artifact.directory)
    ranks.meet()
    if ranks.from_main(finished):
        logger.info("Recovery was stopped after its last file; there is nothing left to do")
    else:
        _tune(context, artifact, config)
    digest = ""
    if ranks.is_main:
        clear(directory)
        digest = folder_digest(directory)
    ranks.meet()
    return Artifact(kind=KIND, directory=directory, digest=ranks.from_main(digest))


def _tune(context: StageContext, artifact: Artifact, config: RecoveryConfig) -> None:
    pruned, directory, ranks = Calibrated(artifact.directory), context.output_dir, context.ranks
    if ranks.is_main:
        (directory / _FACTS).unlink(missing_ok=True)  # of a result that has been damaged since
    model = resident(narrowed_on_demand(pruned.source, pruned.outside(), pruned.block))
    history = recover(context, context.source, model, config, "llm.FlapPruner.recovery")
    if history.is_usable:
        store = BlockStore(directory)
        for index in range(context.source.num_blocks):
            tensors = tensors_below(model, context.source.block_prefix(index))
            if ranks.is_main:
                store.save(index, {name: to_storage(tensor, name) for name, tensor in tensors.items()}, {"index": index})
        outside = tensors_outside(model, list(pruned.outside()))
        if ranks.is_main:
            write_outside(pruned.source, directory, outside)
    elif ranks.is_main:
        logger.warning("Recovery came to nothing: the pruned model is handed on as it was")
        hand_on(pruned, directory)
    if ranks.is_main:
        atomic_write_json(directory / _FACTS, {**facts(artifact.directory), "recovery": asdict(history)})
