"""A job that has ended, made up on disk: folders of models, a manifest and a certificate, without any stage being run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.manifest import Lineage, ManifestFile, Publication, RunRecord, Status
from jobs.results.artifacts import describe_folder
from jobs.workspace import MANIFEST
from tests.support.byte_model import save_model


def finished_job(
    user_folder: Path,
    name: str = "first",
    *,
    service: str = "Kompress",
    algorithm: str = "GPTQ",
    formats: Sequence[str] = ("dense",),
    coded: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
    status: Status = Status.FINISHED,
    model: str = "org/base",
    lineage: Lineage | None = None,
    **changes: object,
) -> Path:
    """The job folder.

    Args:
        user_folder: of the job.
        name: its JOB_ID.
        service: its JOB_SERVICE.
        algorithm: its ALGORITHM.
        formats: what it wrote, the first into the folder itself.
        coded: those of them whose config.json speaks of a quantization.
        failed: format -> why its certificate failed; without a config.json then.
        status: of its last run.
        model: what it started from.
        lineage: how that came about.
        changes: of the tiny Llama's configuration.
    """
    folder, failed = user_folder / "jobs" / service / name, failed or {}
    for place, form in enumerate(formats):
        inside = folder / "exports" / form if place else folder
        save_model(inside, **changes)
        config = inside / "config.json"
        if form in coded:
            config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": form}}))
    files = {name: record for name, record in describe_folder(folder).items() if name != MANIFEST}
    for form in failed:
        (folder / ("" if form == formats[0] else f"exports/{form}") / "config.json").unlink()
    verdicts = [
        {"format": form, "verdict": "failed" if form in failed else "passed", "reason": failed.get(form, "")}
        for form in formats
    ]
    ManifestFile(folder / "manifest.json").update(
        job=f"{service}/{name}",
        algorithm=algorithm,
        model={"name": model},
        lineage=lineage,
        run=RunRecord(id="1", status=status, started="then", finished="later"),
        published=Publication(key="k", files=files),
        certificate={"key": "k", "formats": verdicts},
    )
    return folder
