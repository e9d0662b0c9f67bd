"""A model on disk that somebody wants scored: a job's folder, one of its artifacts, or any Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm
from algorithms.modeling.files import folder_digest
from algorithms.modeling.source import ModelSource
from algorithms.registry import config_class
from configs.errors import DataError, RecipeError
from configs.loader import load_recipe
from configs.names import EXPORTS
from jobs.execution.collaborators import Collaborators
from jobs.execution.preparation import Materials, build_algorithm, users_mistakes
from jobs.manifest import StageRecord, Status, read_manifest
from jobs.reporting.model_card import NAME as CARD
from jobs.results.artifacts import FileRecord, check_files
from jobs.results.publishing import CONFIG
from jobs.workspace import MANIFEST, RECIPE

OUR_LAYOUTS = "bitpress-"  # how quant_method begins where transformers would start from random weights


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A float32 model, opened when it is needed, and the digest that names its content.

    ``algorithm`` is that of the job that wrote it, where one did.
    """

    open: Callable[[], nn.Module]
    digest: str
    algorithm: CompressionAlgorithm | None = None


def load_stored(directory: Path, materials: Materials) -> StoredModel:
    """What stands in ``directory``, for a job whose algorithm may have written it.

    Raises:
        DataError: see :func:`find_stored`.
    """
    found = find_stored(
        directory,
        source=materials.source,
        parts=materials.parts,
        trust_remote_code=materials.loaded.recipe.trust_remote_code,
        algorithm=materials.algorithm,
    )
    if found is None:
        raise DataError(
            f"{directory} holds no model: no {CONFIG}, and no finished stage of a job. Name a job folder, a folder below its "
            "tmp/, or a Hugging Face model folder."
        )
    return found


def find_stored(
    directory: Path,
    *,
    source: ModelSource | None,
    parts: Collaborators,
    trust_remote_code: bool,
    algorithm: CompressionAlgorithm | None = None,
) -> StoredModel | None:
    """What stands in ``directory``: read by the algorithm of the job that wrote it, else as any Hugging Face folder.

    Args:
        directory: a job folder, a folder below its tmp/ or exports/, or a model folder.
        source: the uncompressed model, where it is known.
        parts: reads folders that no job wrote.
        trust_remote_code: whether such a folder may run its own code.
        algorithm: reads the folders of jobs with this algorithm; for other jobs, what their own recipe says.

    Returns:
        None where there is neither a finished artifact nor a model.

    Raises:
        DataError: a folder that cannot be read without its job, or a job whose recipe is not valid.
    """
    place = directory.expanduser().resolve()
    found = _record_of(place)
    if found is not None:
        record, job_dir = found
        state = check_files(place, _files_in(place, record), full=True)
        if state.damaged:
            raise DataError(f"{place} is damaged: {'; '.join(state.problems[:3])}. Run its job again.")
        owner = algorithm
        if owner is None or owner.name != record.algorithm:
            owner = _algorithm_of(job_dir, parts)
        return StoredModel(open=_opener(owner, record, place, source), digest=record.key, algorithm=owner)
    if not (place / CONFIG).is_file():
        return None
    try:
        settings = json.loads((place / CONFIG).read_text(encoding="utf-8")).get("quantization_config") or {}
    except (ValueError, AttributeError) as error:
        raise DataError(f"{place / CONFIG} is not the configuration of a model ({error}).") from error
    if str(settings.get("quant_method", "")).startswith(OUR_LAYOUTS):
        raise DataError(
            f"{directory} is packed in a layout of this program, and the job that wrote it is not around it. "
            "Name the folder where it stands below its job."
        )
    plain = ModelSource(place, trust_remote_code=trust_remote_code)
    return StoredModel(open=lambda: parts.open_source(plain), digest=folder_digest(place))


def _opener(
    algorithm: CompressionAlgorithm, record: StageRecord, place: Path, source: ModelSource | None
) -> Callable[[], nn.Module]:
    artifact = Artifact(kind=record.kind, directory=place, digest=record.key)

    def _open() -> nn.Module:
        with users_mistakes():
            model = algorithm.open(artifact).eval().requires_grad_(False)
            return algorithm.as_served(model, artifact, source or ModelSource(place))

    return _open


def _algorithm_of(job_dir: Path, parts: Collaborators) -> CompressionAlgorithm:
    """The algorithm as the job's own recipe sets it up."""
    try:
        return build_algorithm(load_recipe(job_dir / RECIPE, plugin_config=config_class), parts)
    except RecipeError as error:
        raise DataError(f"{job_dir / RECIPE}, the recipe of the job that wrote the model, is not valid.\n{error}") from error


def _files_in(place: Path, record: StageRecord) -> Mapping[str, FileRecord]:
    """What a stage has written into a folder of its job, where the format's own folder is another one than the stage's."""
    below = f"{EXPORTS}/{place.name}/" if place.parent.name == EXPORTS else ""
    inside = {name.removeprefix(below): found for name, found in record.files.items() if name.startswith(below)}
    return {name: found for name, found in inside.items() if name != CARD}  # which is written anew after every evaluation


def _record_of(place: Path) -> tuple[StageRecord, Path] | None:
    """The finished stage that wrote the folder, and its job.

    A job folder stands for its last stage, tmp/<directory> for its own. A format in ``exports/<format>`` of either belongs to
    the last stage too.
    """
    if place.parent.name == EXPORTS:
        place = place.parent.parent
    for job_dir, wanted in ((place, None), (place.parent.parent, place.name)):
        if not (job_dir / MANIFEST).is_file():
            continue
        manifest = read_manifest(job_dir / MANIFEST)
        published = None if manifest.published is None else manifest.published.key
        for record in manifest.stages.values():
            matches = record.key == published if wanted is None else record.directory == wanted
            if matches and record.status is Status.FINISHED:
                return record, job_dir
    return None
