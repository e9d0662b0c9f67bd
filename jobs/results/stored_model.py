"""A model on disk that somebody wants scored: a job's folder, one of its artifacts, or any Hugging Face folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from algorithms.base import Artifact
from algorithms.modeling.files import folder_digest
from configs.errors import DataError
from configs.names import EXPORTS
from jobs.execution.preparation import Materials, users_mistakes
from jobs.manifest import StageRecord, Status, read_manifest
from jobs.results.publishing import CONFIG
from jobs.workspace import MANIFEST

OUR_LAYOUTS = "bitpress-"  # how quant_method begins where transformers would start from random weights


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A float32 model that runs, and the digest that names its content."""

    model: nn.Module
    digest: str


def load_stored(directory: Path, materials: Materials) -> StoredModel:
    """Load what stands in ``directory``: with the algorithm's own reader where a job of it wrote the folder, else as it stands.

    Raises:
        DataError: the folder holds neither a finished artifact nor a model, or one that cannot be loaded.
    """
    place = directory.expanduser().resolve()
    found = _record_of(place, materials)
    if found is not None:
        artifact = Artifact(kind=found.kind, directory=place, digest=found.key)
        with users_mistakes():
            model = materials.algorithm.as_served(materials.algorithm.open(artifact), artifact, materials.source)
        return StoredModel(model=model.eval().requires_grad_(False), digest=found.key)
    if not (place / CONFIG).is_file():
        raise DataError(
            f"{directory} holds no model: no {CONFIG}, and no finished stage of a job with {materials.algorithm.name}. "
            "Name a job folder, a folder below its tmp/, or a Hugging Face model folder."
        )
    quantization = json.loads((place / CONFIG).read_text(encoding="utf-8")).get("quantization_config") or {}
    if str(quantization.get("quant_method", "")).startswith(OUR_LAYOUTS):
        raise DataError(
            f"{directory} is packed in a layout of this program, and the job that wrote it is not around it. "
            "Name the folder where it stands below its job, with that job's recipe."
        )
    dense = materials.parts.load_dense(place, materials.loaded.recipe.trust_remote_code)
    return StoredModel(model=dense, digest=folder_digest(place))


def _record_of(place: Path, materials: Materials) -> StageRecord | None:
    """The finished stage that wrote the folder: a job folder stands for its last stage, tmp/<directory> for its own.

    A format in ``exports/<format>`` of either belongs to the last stage too.
    """
    last = materials.specs[-1].name
    if place.parent.name == EXPORTS:
        place = place.parent.parent
    for manifest_path, wanted in ((place / MANIFEST, None), (place.parent.parent / MANIFEST, place.name)):
        if not manifest_path.is_file():
            continue
        manifest = read_manifest(manifest_path)
        for name, record in manifest.stages.items():
            matches = name == last if wanted is None else record.directory == wanted
            if matches and record.status is Status.FINISHED and record.algorithm == materials.algorithm.name:
                return record
    return None
