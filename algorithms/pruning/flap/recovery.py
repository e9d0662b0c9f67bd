"""FLAP's third stage, where it is asked for: what is left of the model learns the original's distributions again."""

from __future__ import annotations

import logging
from dataclasses import asdict

from algorithms.base import Artifact, StageContext
from algorithms.blockwise.stages import facts, hand_on, tune_calibrated, write_outside
from algorithms.finetuning.recovery import recover, tensors_below, tensors_outside
from algorithms.finetuning.recovery_config import RecoveryConfig
from algorithms.formats.checkpoint import Calibrated
from algorithms.formats.storage import to_storage
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.on_demand import resident
from algorithms.modeling.transforms.narrowing import narrowed_on_demand

logger = logging.getLogger(__name__)

KIND = "flap-recovery"
_FACTS = "calibration.json"


def recover_pruned(context: StageContext, artifact: Artifact, config: RecoveryConfig) -> Artifact:
    """Tune the pruned model; leaves the layout of the pruning, whose calibration.json has the losses of every step as well."""
    return tune_calibrated(
        context, artifact, lambda: _tune(context, artifact, config), kind=KIND, report=_FACTS, name="Recovery"
    )


def _tune(context: StageContext, artifact: Artifact, config: RecoveryConfig) -> None:
    pruned, directory, ranks = Calibrated(artifact.directory), context.output_dir, context.ranks
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
