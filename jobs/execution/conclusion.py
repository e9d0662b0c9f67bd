"""What follows the stages: certificate, publication, evaluation, model card, closing summary, tidying up."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor, nn

from algorithms.base import Artifact
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.on_demand import place
from configs.errors import CertificateError, DataError, visible
from configs.loader import LoadedRecipe
from jobs.estimation.prediction import CERTIFICATE, EVALUATION
from jobs.evaluation import BASE, Examiner, IncompleteEvaluationError, Memory, Questions, Subject, placed
from jobs.execution.resources import Meter, Usage
from jobs.execution.stage import Job
from jobs.manifest import Manifest, Publication, StageRecord, Status, now
from jobs.planning import Plan, PlannedStage
from jobs.reporting.card_header import origin_of
from jobs.reporting.certificate import (
    NUM_WINDOWS,
    WINDOW_LENGTH,
    FormatCertificate,
    Verdict,
    certificate_windows,
    certify,
)
from jobs.reporting.html.report import Account, write_report
from jobs.reporting.model_card import NAME, loading_notes, model_card
from jobs.reporting.secrets import without_secrets
from jobs.reporting.summary import BitAccount, CostRow, Summary
from jobs.results.artifacts import clear_results
from jobs.results.publishing import CONFIG, EXPORTS, count_files, format_folder, is_published, publish, write_extra
from jobs.scoring.figures import Figures, as_records, from_records

logger = logging.getLogger(__name__)

DENSE = "dense"  # the export of plain float16 weights
_WEIGHTS = (".safetensors", ".gguf", ".engine")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The stages' result. ``given`` is what the last stage made it from, where that is still on disk."""

    job: Job
    plan: Plan
    artifact: Artifact
    given: Artifact | None
    questions: Questions | None
    loaded: LoadedRecipe

    @property
    def keep_intermediate(self) -> bool:
        """Whether ``tmp/`` stays."""
        return self.loaded.parameters.save_intermediate_results

    @property
    def is_fresh(self) -> bool:
        """Whether the result was made in this run, so that no earlier verdict or figure counts."""
        return self.plan.goal in self.plan.runs

    @property
    def formats(self) -> tuple[str, ...]:
        """The exported formats; none where the job ends before the export."""
        return tuple(self.job.algorithm.exports) if self.plan.is_complete else ()

    @property
    def unexported(self) -> Artifact:
        """The result before its export, where that is there: an export no longer shows what the weights were made of."""
        return self.given if self.given is not None and self.plan.is_complete else self.artifact

    def remembered(self, entry: Mapping[str, Any] | None, key: str | None = None) -> Mapping[str, Any] | None:
        """An entry of the manifest, if it speaks of this very result (or of ``key``); otherwise None."""
        return None if entry is None or self.is_fresh or entry["key"] != (key or self.artifact.digest) else entry

    def reference(self, name: str) -> nn.Module:
        """What the client of a format has to see: the result, rounded as that format stores it."""
        if name != DENSE:
            return place(self.served(name), self.job.device)
        # Codebooks and scales are float16 values already; their products are rounded only where they are written out.
        rounded = self.job.algorithm.load(self.unexported).eval().requires_grad_(False)
        for tensor in rounded.parameters():
            tensor.data = tensor.data.half().float()
        return rounded.to(self.job.device)

    def served(self, client: str | None = None) -> nn.Module:
        """The result as it computes where it is served, or as the client of a format computes it here.

        Read block by block where the algorithm can.
        """
        algorithm = self.job.algorithm
        return algorithm.as_served(algorithm.open(self.unexported).eval(), self.unexported, self.job.source, client)


def conclude(outcome: Outcome) -> Summary:
    """Certify, publish, evaluate, describe and tidy up; what an earlier run has already done for this result is kept.

    Raises:
        CertificateError: a client reads its format differently. Everything else has been written then, but for the
            config.json of that format, and nothing has been deleted.
    """
    job, before = outcome.job, outcome.job.manifest.current
    job.manifest.update(warnings=(*job.manifest.current.warnings, *outcome.plan.warnings))
    certificates = _certificates(outcome) if outcome.formats else ()
    failed = [c for c in certificates if c.verdict is Verdict.FAILED]
    if outcome.formats:
        _publish(outcome, withheld=[format_folder(c.format, outcome.formats) for c in failed])
        _write_card(outcome, _summary(outcome, Figures(), certificates, before))
    for note in job.algorithm.serving_notes(job.workspace.job_dir):
        logger.info("%s", note)
    incomplete: IncompleteEvaluationError | None = None
    try:
        figures = Figures() if outcome.questions is None else _figures(outcome, outcome.questions)
    except IncompleteEvaluationError as error:  # said once the card and the report have all the rest
        incomplete, figures = error, error.figures
    summary = _summary(outcome, figures, certificates, before)
    if outcome.formats and figures:
        _write_card(outcome, summary)
    _write_report(outcome, summary)
    if failed:
        job.manifest.close_run(Status.CERTIFICATE_FAILED)
        raise CertificateError(_failure(job, failed))
    if incomplete is not None:
        raise incomplete
    if outcome.formats and not outcome.keep_intermediate:
        clear_results(job.workspace, {stage.directory for stage in job.manifest.current.stages.values()})
    return summary


def _certificates(outcome: Outcome) -> tuple[FormatCertificate, ...]:
    job, earlier = outcome.job, outcome.remembered(outcome.job.manifest.current.certificate)
    if earlier is not None:
        found = [FormatCertificate(**{**entry, "verdict": Verdict(entry["verdict"])}) for entry in earlier["formats"]]
        if all(c.verdict is Verdict.PASSED for c in found) and tuple(c.format for c in found) == outcome.formats:
            _restore(job.workspace.certificate_path, earlier)
            return tuple(found)
    folders = {name: outcome.artifact.directory / format_folder(name, outcome.formats) for name in outcome.formats}
    sequences = _certificate_text(outcome)
    with Meter() as meter:
        certificates = certify(
            folders,
            certificate_windows(sequences, job.source.vocab_size),
            outcome.reference,
            scratch_dir=job.workspace.scratch_dir("certificate"),
            command=job.parts.client_command,
        )
    record = {
        "key": outcome.artifact.digest,
        "time": now(),
        "versions": dict(job.manifest.current.versions),
        "formats": [asdict(c) for c in certificates],
        "cost": asdict(meter.usage()),
        "predicted": _predicted(job, CERTIFICATE),
    }
    atomic_write_json(job.workspace.certificate_path, record)
    job.manifest.update(certificate=record)
    return certificates


def _restore(path: Path, record: Mapping[str, Any]) -> None:
    """Write certificate.json again where it does not say what the manifest knows."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        written = None
    if written != record:
        logger.info("%s was missing or damaged; written again from the manifest", path)
        atomic_write_json(path, record)


def _certificate_text(outcome: Outcome) -> Sequence[Tensor]:
    """Some text for the certificate: from EVALUATION, or else what the first stage calibrated on."""
    job = outcome.job
    if outcome.questions is not None and outcome.questions.tokens:
        first = next(iter(outcome.questions.tokens.values()))
        return first[: NUM_WINDOWS * WINDOW_LENGTH].split(WINDOW_LENGTH)
    requests = [stage.spec.tokens for stage in outcome.plan.stages if stage.spec.tokens is not None]
    try:
        tokens = job.parts.load_tokens(job.recipe, requests[0], job.source, job.workspace) if requests else None
    except DataError as error:  # a reused calibration may ask for more than today's data has
        logger.info("The certificate uses random tokens: %s", error)
        return ()
    return () if tokens is None else tokens.validation or tokens.train


def _publish(outcome: Outcome, withheld: list[str]) -> None:
    job, stage = outcome.job, outcome.plan.goal
    files, job_dir = job.manifest.current.stages[stage.spec.name].files, job.workspace.job_dir
    if outcome.artifact.directory == job_dir:
        return
    publication = Publication(key=stage.key, files=files)
    folder, published = outcome.artifact.directory, job.manifest.current.published
    if outcome.is_fresh or not is_published(folder, job_dir, published, publication, withheld):
        publish(folder, job_dir, job.manifest, publication, withheld=withheld)
        logger.info("Published %s to %s", count_files(len(files)), job_dir)


def _figures(outcome: Outcome, questions: Questions) -> Figures:
    job, key = outcome.job, questions.key(outcome.artifact.digest)
    manifest = job.manifest
    earlier = outcome.remembered(manifest.current.evaluation, key)
    if earlier is not None and "time" in earlier:
        return from_records(earlier)
    before = dict(manifest.current.evaluation or {})
    found = dict(before.get("done", {}))
    if outcome.is_fresh:  # made in this run, perhaps to the same key as before: nothing said of it counts
        found = {item: record for item, record in found.items() if record["subject"] != outcome.artifact.digest}
        before = {"key": "", "figures": [], "done": found}
    spent = before["spent"]["cost"] if before.get("spent", {}).get("key") == key else None
    known = {item: record["result"] for item, record in found.items()}

    def _keep(item: str, subject: str, record: Mapping[str, object]) -> None:
        found[item] = {"subject": subject, "result": record}
        cost = asdict(meter.usage().after(spent))
        manifest.update(evaluation={**before, "done": found, "spent": {"key": key, "cost": cost}})

    with Meter() as meter:
        measured = measure(
            job,
            questions,
            Subject(
                key=outcome.artifact.digest,
                label=job.algorithm.product,
                open=lambda: placed(outcome.served(), job.device, questions.settings),
            ),
            memory=Memory(known=known, keep=_keep),
        )
    record = {**measured.record(), "cost": asdict(meter.usage().after(spent)), "predicted": _predicted(job, EVALUATION)}
    manifest.update(evaluation={"key": key, "done": found, **record})
    return measured.figures


def _predicted(job: Job, name: str) -> dict[str, object] | None:
    """What a closing line was expected to cost, as the manifest keeps it."""
    prediction = job.predictions.get(name)
    return None if prediction is None else asdict(prediction)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Figures and what it cost to get them."""

    figures: Figures
    cost: Usage

    def record(self) -> dict[str, object]:
        """As the manifest keeps it."""
        return {"time": now(), **as_records(self.figures), "cost": asdict(self.cost)}


def measure(
    job: Job,
    questions: Questions,
    model: Subject | None,
    *,
    memory: Memory | None = None,
    mark: Mapping[str, object] | None = None,
) -> Measured:
    """Score a model beside the uncompressed one, or with None that one alone.

    Each result becomes a line of metrics.jsonl, with ``mark`` in it; tasks leave files in the job's ``evaluation`` folder.
    """
    examiner = Examiner(
        questions=questions,
        parts=job.parts,
        progress=job.parts.terminal.progress,
        folder=job.workspace.evaluation_dir,
        cache_dir=job.workspace.cache_dir,
        tokenizer=job.source.tokenizer,
        memory=memory or Memory(),
        note=lambda record: job.metrics({"stage": "evaluation", **(mark or {}), **record}),
    )
    base = Subject(
        key=job.source.digest,
        label=BASE,
        open=lambda: placed(job.parts.open_source(job.source), job.device, questions.settings),
    )
    with Meter() as meter:
        figures = examiner.score(base, model)
    return Measured(figures=figures, cost=meter.usage())


def _bits(outcome: Outcome) -> Mapping[str, float]:
    job, earlier = outcome.job, outcome.remembered(outcome.job.manifest.current.bits)
    if earlier is not None:
        return earlier["bits"]
    bits = {name: float(value) for name, value in job.algorithm.bits(outcome.unexported).items()}
    job.manifest.update(bits={"key": outcome.artifact.digest, "bits": bits})
    return bits


def _summary(outcome: Outcome, figures: Figures, certificates: tuple[FormatCertificate, ...], before: Manifest) -> Summary:
    job, source = outcome.job, outcome.job.source
    manifest = job.manifest.current
    names = [stage.spec.name for stage in outcome.plan.stages]
    sizes = {name: _published_size(outcome, format_folder(name, outcome.formats)) for name in outcome.formats}
    stages = {name: manifest.stages[name] for name in names if _counts(outcome, name)}
    size_before = sum((source.directory / name).stat().st_size for name in set(source.weight_files.values()))
    job.manifest.update(sizes={"before": size_before, "after": dict(sizes)})
    return Summary(
        model=source.name,
        lineage=manifest.lineage,
        method=job.algorithm.name,
        output=job.workspace.job_dir if outcome.formats else outcome.artifact.directory,
        bits=BitAccount.of(_bits(outcome), source.num_parameters),
        size_before=size_before,
        size_after=sizes.pop(outcome.formats[0]) if outcome.formats else None,
        further_sizes=sizes,
        figures=figures,
        certificates=certificates,
        stages=stages,
        closing=_closing(outcome, before),
        ran=[stage.spec.name for stage in outcome.plan.runs],
        data={name: _data(record, outcome.plan[name]) for name, record in stages.items() if record.tokens_key is not None},
    )


def _closing(outcome: Outcome, before: Manifest) -> dict[str, CostRow]:
    """What certificate and evaluation of this result cost, and whether that was since the stages ended."""
    manifest, digest = outcome.job.manifest.current, outcome.artifact.digest
    keys = {CERTIFICATE: digest, EVALUATION: None if outcome.questions is None else outcome.questions.key(digest)}
    entries = {
        CERTIFICATE: (manifest.certificate, before.certificate),
        EVALUATION: (manifest.evaluation, before.evaluation),
    }
    return {
        name: CostRow.of(entry["cost"], entry.get("predicted"), ran=entry is not earlier)
        for name, (entry, earlier) in entries.items()
        if entry is not None and entry["key"] == keys[name] and "cost" in entry  # none as long as it is not finished
    }


def _data(record: StageRecord, planned: PlannedStage) -> str:
    """The text that a stage was given, and whether the recipe has come to name another."""
    return record.data if record.tokens_key == planned.tokens_key else f"{record.data} (not the text that the recipe names now)"


def _counts(outcome: Outcome, name: str) -> bool:
    """Whether the stage's record belongs to this result: its key is the plan's."""
    record = outcome.job.manifest.current.stages.get(name)
    return record is not None and record.key == outcome.plan[name].key


def _published_size(outcome: Outcome, folder: str) -> int:
    """Bytes of the weights of the format in a folder, as :func:`format_folder` names it; a format may have folders inside."""
    files = outcome.job.manifest.current.stages[outcome.plan.goal.spec.name].files
    below = {name: PurePosixPath(name).relative_to(folder) for name in files if PurePosixPath(name).is_relative_to(folder)}
    return sum(files[name].size for name, path in below.items() if path.suffix in _WEIGHTS and EXPORTS not in path.parts)


def _write_card(outcome: Outcome, summary: Summary) -> None:
    job = outcome.job
    config = _read_config(outcome.artifact.directory / CONFIG)
    earlier = () if summary.lineage is None else summary.lineage.methods
    card = model_card(
        summary,
        formats=outcome.formats,
        recipe=job.workspace.recipe_path.read_text(encoding="utf-8"),
        tags=("compression", *dict.fromkeys(method.lower() for method in (*earlier, job.algorithm.name))),
        notes=(*loading_notes(config), *job.algorithm.serving_notes(job.workspace.job_dir), *_trust_notes(job)),
        origin=origin_of(job.source.directory, summary.stages.values(), job.algorithm.relation),
    )
    shown = visible(without_secrets(card, os.environ))
    write_extra(job.workspace.job_dir / NAME, shown, job.manifest, job.workspace.job_dir)


def _trust_notes(job: Job) -> tuple[str, ...]:
    """That somebody else's code had a part in this, where it was allowed one."""
    if not job.recipe.trust_remote_code:
        return ()
    return (f"Made with TRUST_REMOTE_CODE: code that comes with {job.source.name} was allowed to run.",)


def _write_report(outcome: Outcome, summary: Summary) -> None:
    job = outcome.job
    account = Account(summary=summary, manifest=job.manifest.current, metrics=job.workspace.metrics_path, loaded=outcome.loaded)
    write_report(account, job.workspace.report_path)


def _read_config(path: Path) -> Mapping[str, object]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _failure(job: Job, failed: list[FormatCertificate]) -> str:
    lines = [f"{c.format}: {c.reason}" for c in failed]
    return (
        f"The certificate failed. {' '.join(lines)} The config.json of each of them was not published; the files are in "
        f"{job.workspace.tmp_dir} and the details in {job.workspace.certificate_path}."
    )
