"""The forecast of a job: for everything that will run, the best prediction that there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from algorithms.workload import ModelShapes
from jobs.estimation import store
from jobs.estimation.coarse import CoarseEstimate, Machine
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction, total
from jobs.estimation.probe import Probed
from jobs.execution.preparation import Materials
from jobs.manifest import Manifest, StageRecord
from jobs.planning import Plan


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predictions by stage that runs, in order, then certificate and evaluation where they follow."""

    predictions: Mapping[str, Prediction] = field(default_factory=dict)

    @property
    def total(self) -> Prediction:
        """Of all of it."""
        return total(self.predictions.values())

    def of(self, name: str) -> Prediction | None:
        """Of a stage or closing line."""
        return self.predictions.get(name)


def forecast(
    materials: Materials, plan: Plan, manifest: Manifest, device: torch.device, probed: Probed | None = None
) -> Forecast:
    """The best that is known: what the same stage cost before, else a probe of now or earlier, else a guess from shapes.

    A fresh probe is kept for the run that follows it.
    """
    recipe, cache = materials.loaded.recipe, materials.workspace.cache_dir
    names, keys = _names(materials, plan), store.keys_of(plan, recipe)
    if probed is not None:
        measured = probed.predictions(ModelShapes.of(materials.source), [stage.spec.name for stage in plan.runs])
        measured = {name: prediction for name, prediction in measured.items() if name in names}
        store.keep(cache, keys, measured, device.type)
    else:
        measured = store.recall(cache, keys, device.type)
    records = {stage.spec.name: stage.record for stage in plan.runs if stage.record is not None}
    same = {name: record for name, record in records.items() if record.key == keys[name] and record.files}
    earlier = {name: as_prediction(record) for name, record in same.items()}
    found = {**measured, **earlier}
    if any(name not in found for name in names):
        guess = CoarseEstimate(
            recipe=recipe, algorithm=materials.algorithm, source=materials.source, machine=Machine.measured(device)
        )
        found = {**guess.stages(plan.runs, materials.specs), **guess.closing(), **found}
    return Forecast(predictions={name: found[name] for name in names if name in found})


def as_prediction(record: StageRecord) -> Prediction:
    """That a stage will cost what it did before."""
    return Prediction(
        user_cpu_s=record.user_cpu_s,
        wall_s=record.wall_s,
        peak_memory_bytes=record.peak_memory_bytes,
        disk_bytes=sum(entry.size for entry in record.files.values()),
        peak_cuda_memory_bytes=record.peak_cuda_memory_bytes,
        basis=Basis.EARLIER,
    )


def _names(materials: Materials, plan: Plan) -> list[str]:
    """All that will run. What was certified or scored before is not done again for the same result."""
    names = [stage.spec.name for stage in plan.runs]
    if not names:
        return []
    recipe = materials.loaded.recipe
    if plan.is_complete:
        names.append(CERTIFICATE)
    if recipe.evaluation is not None and recipe.evaluation.corpora:
        names.append(EVALUATION)
    return names
