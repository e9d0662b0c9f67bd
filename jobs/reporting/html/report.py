"""report.html: what a job made of a model, what it cost, and how far it can be trusted, on one page."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from algorithms.modeling.files import atomic_write_text
from configs.loader import LoadedRecipe
from jobs.logs import duration
from jobs.manifest import Manifest
from jobs.reporting.certificate import FormatCertificate, Verdict
from jobs.reporting.html.drawing import Axis, bars, shares
from jobs.reporting.html.layers import errors_section, experts_section, tuning_section
from jobs.reporting.html.measurements import read_measurements
from jobs.reporting.html.page import Badge, Drawing, Number, Page, Row, Section, Table
from jobs.reporting.html.settings import settings_of
from jobs.reporting.secrets import without_secrets
from jobs.reporting.summary import FIGURE_COLUMNS, STAGE_COLUMNS, TASK_COLUMNS, Summary, size
from jobs.scoring.figures import CorpusFigures

logger = logging.getLogger(__name__)

_KL = (
    "KL is the mean divergence of the compressed model's next-token distribution from the uncompressed one's; intervals are "
    "95 % bootstrap intervals over windows."
)


@dataclass(frozen=True, kw_only=True)
class Account:
    """All that a report speaks of. ``metrics`` is the job's metrics.jsonl, ``loaded`` has the settings with their defaults."""

    summary: Summary
    manifest: Manifest
    metrics: Path
    loaded: LoadedRecipe


def report(account: Account) -> str:
    """The report as HTML."""
    summary, manifest = account.summary, account.manifest
    found = read_measurements(account.metrics, summary.stages)
    badges = [_badge(certificate) for certificate in summary.certificates]
    return Page(
        title=f"{summary.model}, compressed with {summary.method}",
        subtitle=f"Job {manifest.job}. Output: {summary.output}",
        badges=badges or [Badge(text="no certificate: nothing was exported", kind="unchecked")],
        numbers=_numbers(summary),
        sections=[
            _certificate(summary),
            _quality(summary),
            _bits(summary),
            errors_section(found.blocks),
            experts_section(found.blocks),
            tuning_section(found),
            _costs(summary),
            Section(id="warnings", title="Warnings", notes=_warnings(account)),
            _environment(account),
            _recipe(account),
        ],
    ).render()


def write_report(account: Account, path: Path) -> None:
    """Write the report. It is for people: whatever goes wrong with it is said, and costs nothing else."""
    try:
        atomic_write_text(path, without_secrets(report(account), os.environ))
    except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("The report could not be written: %s: %s", type(error).__name__, error)
        return
    logger.info("Report: %s", path)


def _badge(certificate: FormatCertificate) -> Badge:
    kinds = {Verdict.PASSED: "passed", Verdict.FAILED: "failed"}
    return Badge(text=f"{certificate.format}: {certificate.verdict.value}", kind=kinds.get(certificate.verdict, "unchecked"))


def _numbers(summary: Summary) -> list[Number]:
    found = []
    if summary.bits is not None:
        found.append(Number(value=f"{summary.bits.per_weight:.3f}", label="bits a compressed weight, all counted"))
        found.append(Number(value=f"{summary.bits.per_model_parameter:.3f}", label="bits a parameter of the whole model"))
    if summary.size_after is not None:
        times = summary.size_before / summary.size_after if summary.size_after else 0
        found.append(
            Number(
                value=f"{size(summary.size_before)} → {size(summary.size_after)}",
                label=f"weights on disk, {times:.2f} times smaller{_on_disk(summary)}",
            )
        )
    for one in summary.figures.corpora:
        if one.perplexity is not None:
            change = (one.perplexity / one.base_perplexity - 1) * 100
            label = f"perplexity on {one.corpus} at {one.sequence_length} tokens, {change:+.2f} %"
            found.append(Number(value=f"{one.base_perplexity:.4g} → {one.perplexity:.4g}", label=label))
        if one.kl_divergence is not None:
            found.append(Number(value=f"{one.kl_divergence:.4g}", label=f"KL divergence on {one.corpus}, nats a token"))
    return found


def _on_disk(summary: Summary) -> str:
    if summary.bits is None or summary.size_after is None:
        return ""
    return f"; {8 * summary.size_after / summary.bits.model_parameters:.3f} bits a parameter, padding and headers included"


def _certificate(summary: Summary) -> Section:
    rows = [(c.format, c.verdict.value, c.reason) for c in summary.certificates]
    return Section(
        id="certificate",
        title="Certificate",
        texts=[
            "Each format was read back by its own client in a fresh process and compared with the compressor's own reading."
        ],
        tables=[Table.of(("format", "verdict", "details"), rows)],
    )


def _quality(summary: Summary) -> Section:
    compared = [one for one in summary.figures.corpora if one.perplexity is not None]
    figures = []
    if compared:
        svg = bars(
            "Perplexity before and after",
            {f"{one.corpus}\n({one.sequence_length} tokens)": _pair(one) for one in compared},
            Axis(x="", y="perplexity"),
            {f"{one.corpus}\n({one.sequence_length} tokens)": _pair_of_intervals(one) for one in compared},
        )
        caption = (
            "Perplexity, with 95 % bootstrap intervals over windows. Both models see the same windows, so the change is known "
            f"better than the intervals suggest: {'; '.join(map(_ratio, compared))}."
        )
        figures.append(Drawing(svg=svg, caption=caption))
    return Section(
        id="quality",
        title="Before and after",
        texts=[
            "Perplexity depends on the sequence length; compare figures of one length only.",
            *([_KL] if any(one.kl_divergence is not None for one in summary.figures.corpora) else []),
        ],
        tables=[
            Table.of(FIGURE_COLUMNS, summary.figure_rows()),
            Table.of(TASK_COLUMNS, summary.task_rows()),
        ],
        figures=figures,
    )


def _pair(one: CorpusFigures) -> dict[str, float]:
    return {"uncompressed": one.base_perplexity, "compressed": one.perplexity or math.nan}


def _pair_of_intervals(one: CorpusFigures) -> dict[str, tuple[float, float]]:
    both = {"uncompressed": one.base_perplexity_interval, "compressed": one.perplexity_interval}
    return {name: interval for name, interval in both.items() if interval is not None}


def _ratio(one: CorpusFigures) -> str:
    assert one.perplexity is not None
    text = f"{one.corpus} {(one.perplexity / one.base_perplexity - 1) * 100:+.2f} %"
    if one.ratio_interval is not None:
        low, high = ((end - 1) * 100 for end in one.ratio_interval)
        text += f" ({low:+.2f} to {high:+.2f} %)"
    return text


def _bits(summary: Summary) -> Section:
    account = summary.bits
    if account is None:
        return Section(id="bits", title="Bits")
    kept = max(account.model_parameters - account.parameters, 0)

    def _row(name: str, bits: float, per_weight: str = "") -> tuple[str, ...]:
        return (name, per_weight, size(bits / 8), f"{bits / account.total:.1%}")

    rows = [_row(name, bits, f"{bits / account.parameters:.4f}") for name, bits in account.components.items()]
    rows.append(_row(f"{kept:,.0f} parameters in 16 bits: embeddings, norms, head", 16 * kept))
    if account.added:
        rows.append(_row("added to the model: a head of its own", account.added))
    rows.append(_row("all", account.total))
    if summary.size_after is not None:
        beyond = 8 * summary.size_after - account.total
        rows.append(_row("padding, headers and names of the first format", beyond))
        rows.append(_row("weights on disk", 8 * summary.size_after))
    files = [(name, size(count)) for name, count in summary.further_sizes.items()]
    return Section(
        id="bits",
        title="Where the bits go",
        texts=[
            f"{account.parameters:,.0f} of {account.model_parameters:,} parameters are compressed. All that is stored counts."
        ],
        tables=[
            Table.of(("part", "bits a compressed weight", "size", "share"), rows),
            Table.of(("further format", "weights on disk"), files),
        ],
        figures=[
            Drawing(
                svg=shares("Bits of a compressed weight", account.parts, "bits a compressed weight"),
                caption="Bits of one compressed weight by what they hold.",
            )
        ],
    )


def _costs(summary: Summary) -> Section:
    costs = {**summary.stages, **summary.closing}
    seconds = {name: {"wall": record.wall_s, "CPU": record.user_cpu_s} for name, record in costs.items()}
    figures = []
    if seconds:
        names = {name.replace("_", "_\n"): value for name, value in seconds.items()}  # the longest would run into each other
        svg = bars("Time of each stage", names, Axis(x="", y="seconds"), {})
        figures.append(Drawing(svg=svg, caption="Time of each stage, over all the attempts that it took."))
    return Section(
        id="costs",
        title="Time and memory",
        texts=["Where a prediction was made before the job started, it stands before the arrow."],
        tables=[Table.of(STAGE_COLUMNS, summary.stage_rows())],
        figures=figures,
    )


def _warnings(account: Account) -> list[str]:
    stages = [f"{name}: {text}" for name, record in account.summary.stages.items() for text in record.warnings]
    return list(dict.fromkeys([*account.manifest.warnings, *stages]))


def _environment(account: Account) -> Section:
    manifest, summary = account.manifest, account.summary
    rows = [(name, str(value)) for name, value in manifest.versions.items()]
    rows += [(f"text for {stage}", text) for stage, text in summary.data.items()]
    rows += [(f"seed of {name}", str(seed)) for name, seed in _seeds(account).items()]
    rows += [("model digest", str(manifest.model.get("digest", ""))), ("recipe digest", manifest.recipe_digest)]
    if manifest.run is not None:
        rows += [("started", manifest.run.started), ("run", manifest.run.id)]
    measured = (manifest.evaluation or {}).get("cost")
    if measured:
        rows.append(("time of the evaluation", duration(measured["wall_s"])))
    return Section(id="environment", title="Environment", tables=[Table.of(("", ""), rows)])


def _seeds(account: Account) -> Mapping[str, object]:
    """What stages drew their samples with, where they say so."""
    return {
        name: record.request["seed"]
        for name, record in account.summary.stages.items()
        if record.request is not None and "seed" in record.request
    }


def _recipe(account: Account) -> Section:
    rows = [
        Row(cells=(row.key, _shown(row.value), "default" if row.is_default else ""), kind="default" if row.is_default else "")
        for row in settings_of(account.loaded)
    ]
    return Section(
        id="recipe",
        title="Recipe",
        texts=["All keys that this job knows. Those that the recipe leaves out have their defaults, in grey."],
        tables=[Table(columns=("key", "value", ""), rows=rows)],
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
