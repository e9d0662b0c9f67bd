"""Several jobs beside each other: what each takes on disk, what it costs in quality, and which no other beats in both."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from configs.errors import DataError
from configs.names import SERVICES
from jobs.manifest import Manifest, read_manifest
from jobs.reporting.summary import BitAccount, size
from jobs.scoring.figures import CorpusFigures, Figures, Interval, TaskFigures, from_records
from jobs.workspace import MANIFEST

UNCOMPRESSED = "uncompressed"
PERPLEXITY, DIVERGENCE = "perplexity", "KL divergence (nats)"
_WIDTH, _HEIGHT = 64, 14
_MARKS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One job, or an uncompressed model. ``bytes`` are those of its weights on disk, in the first format."""

    name: str
    model: str
    method: str
    figures: Figures
    bytes: int | None = None
    bits: BitAccount | None = None
    certificate: str = ""
    cpu_seconds: float | None = None


@dataclass(frozen=True, order=True)
class ScoredText:
    """What figures have to agree in to be comparable: which text, cut how, scored in which arithmetic."""

    corpus: str
    sequence_length: int
    windows: int
    dtype: str
    digest: str

    def __str__(self) -> str:
        arithmetic = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"{self.corpus} (sequence length {self.sequence_length}, {self.windows} windows{arithmetic})"

    @property
    def short(self) -> str:
        """For the head of a column."""
        return f"{self.corpus}@{self.sequence_length}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the entry of a ``number`` stands: bytes of weights, and a figure of which less is better.

    ``is_best`` says that none other is as small and as good, and better in one of the two.
    """

    number: int
    entry: Entry
    bytes: int
    value: float
    interval: Interval | None
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A figure on one text at one sequence length, over size. Figures of other lengths are not comparable."""

    text: ScoredText
    figure: str
    places: Sequence[Place]

    @property
    def title(self) -> str:
        """What is drawn."""
        return f"{self.figure} on {self.text}"


def find_job(name: str, user_folder: Path) -> Path:
    """The folder of a job.

    Args:
        name: a path, or a JOB_ID or SERVICE/JOB_ID below ``user_folder``.
        user_folder: where jobs are.

    Raises:
        DataError: there is none, or more than one of that name.
    """
    path = Path(name).expanduser()
    if (path / MANIFEST).is_file():
        return path
    jobs = user_folder.expanduser() / "jobs"
    inside = [jobs / name] if "/" in name else [jobs / service / name for service in SERVICES]
    there = [folder for folder in inside if (folder / MANIFEST).is_file()]
    if len(there) == 1:
        return there[0]
    if there:
        raise DataError(
            f"{name}: there are {len(there)} jobs of this name: {', '.join(map(str, there))}. Name one by its path."
        )
    raise DataError(f"{name}: no job there, and none of this name below {jobs}. `python main.py ls` lists them.")


def read_entries(folders: Sequence[Path]) -> list[Entry]:
    """The jobs in their order, behind the uncompressed models that they start from.

    Raises:
        DataError: a job that has no result yet.
    """
    manifests = [read_manifest(folder / MANIFEST) for folder in folders]
    jobs = [_entry(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]
    bases: dict[str, Entry] = {}
    for manifest, job in zip(manifests, jobs, strict=True):
        if job.figures and job.model not in bases:
            before = None if manifest.sizes is None else manifest.sizes["before"]
            bases[job.model] = Entry(
                name=UNCOMPRESSED, model=job.model, method="", figures=_of_the_base(job.figures), bytes=before
            )
        elif job.model in bases:
            earlier, own = bases[job.model].figures, _of_the_base(job.figures)
            texts = {_text_of(corpus): corpus for corpus in (*own.corpora, *earlier.corpora)}
            tasks = {_metric_of(task): task for task in (*own.tasks, *earlier.tasks)}
            bases[job.model] = replace(
                bases[job.model], figures=Figures(corpora=tuple(texts.values()), tasks=tuple(tasks.values()))
            )
    return [*bases.values(), *_told_apart(jobs)]


def planes(entries: Sequence[Entry]) -> list[Plane]:
    """A plane for perplexity and one for KL of every text that two entries of known size have in common."""
    found = []
    texts = dict.fromkeys(_text_of(corpus) for entry in entries for corpus in entry.figures.corpora)
    for text in texts:
        for figure in (PERPLEXITY, DIVERGENCE):
            places = [
                place for number, entry in enumerate(entries) if (place := _place(number, entry, text, figure)) is not None
            ]
            if len(places) > 1:
                found.append(Plane(text=text, figure=figure, places=_with_the_best(places)))
    return found


def _text_of(corpus: CorpusFigures) -> ScoredText:
    return ScoredText(corpus.corpus, corpus.sequence_length, corpus.windows, corpus.dtype, corpus.text)


def _place(number: int, entry: Entry, text: ScoredText, figure: str) -> Place | None:
    corpus = next((one for one in entry.figures.corpora if _text_of(one) == text), None)
    if corpus is None or entry.bytes is None:
        return None
    value, interval = corpus.perplexity, corpus.perplexity_interval
    if figure == DIVERGENCE:
        value, interval = corpus.kl_divergence, corpus.kl_interval
    if value is None or not math.isfinite(value):
        return None
    return Place(number=number, entry=entry, bytes=entry.bytes, value=value, interval=interval)


def table_of(entries: Sequence[Entry]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows."""
    texts = sorted({_text_of(corpus) for entry in entries for corpus in entry.figures.corpora})
    tasks = list(dict.fromkeys(_metric_of(task) for entry in entries for task in entry.figures.tasks))
    shorts = [text.short for text in texts]
    columns = ["", "method", "bits a weight", "bits a parameter", "weights"]
    names = [text.short if shorts.count(text.short) == 1 else f"{text} {text.digest[:4]}".rstrip() for text in texts]
    columns += [f"{what} {name}" for name in names for what in ("ppl", "KL")]
    columns += [f"{task}{'' if shots is None else f':{shots}'} {metric}, {samples}" for task, shots, metric, samples in tasks]
    columns += ["certificate", "CPU"]
    return columns, [_row(entry, texts, tasks) for entry in entries]


def as_text(entries: Sequence[Entry]) -> str:
    """Table and planes for a terminal, in plain characters."""
    columns, rows = table_of(entries)
    widths = [max(len(row[place]) for row in [tuple(columns), *rows]) for place in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [columns, *rows]]
    return "\n".join([*lines, *(line for plane in planes(entries) for line in ["", *_scatter(plane)])])


def as_tables(entries: Sequence[Entry]) -> Group:
    """The same, with the table drawn."""
    columns, rows = table_of(entries)
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Group(table, *(Text("\n" + "\n".join(_scatter(plane))) for plane in planes(entries)))


def _entry(folder: Path, manifest: Manifest) -> Entry:
    if manifest.bits is None and manifest.evaluation is None:
        raise DataError(f"{folder}: this job has no result yet; run it to its end.")
    parameters = int(manifest.model.get("parameters", 0) or 0)
    sizes = {} if manifest.sizes is None else manifest.sizes["after"]
    record = manifest.evaluation
    formats = [] if manifest.certificate is None else manifest.certificate["formats"]
    return Entry(
        name=folder.resolve().name,
        model=str(manifest.model.get("name", "")),
        method=manifest.algorithm,
        figures=Figures() if record is None or "time" not in record else from_records(record),
        bytes=next(iter(sizes.values()), None),
        bits=None if manifest.bits is None else BitAccount.of(manifest.bits["bits"], parameters),
        certificate=", ".join(f"{one['format']} {one['verdict']}" for one in formats),
        cpu_seconds=sum(record.user_cpu_s for record in manifest.stages.values()),
    )


def _of_the_base(figures: Figures) -> Figures:
    """The uncompressed model's own figures."""
    return Figures(
        corpora=tuple(
            replace(
                c, perplexity=c.base_perplexity, perplexity_interval=c.base_perplexity_interval, kl_divergence=None,
                kl_interval=None, top1_agreement=None, top1_interval=None, ratio_interval=None,
            )
            for c in figures.corpora
        ),
        tasks=tuple(
            replace(t, value=t.base_value, error=t.base_error) for t in figures.tasks if t.base_value is not None
        ),
    )  # fmt: skip


def _metric_of(task: TaskFigures) -> tuple[str, int | None, str, int]:
    """What values of tasks have to agree in to be comparable."""
    return task.task, task.num_fewshot, task.metric, task.samples


def _told_apart(jobs: Sequence[Entry]) -> list[Entry]:
    """Jobs of one name get numbers."""
    names = [job.name for job in jobs]
    return [
        replace(job, name=f"{job.name} ({names[: place + 1].count(job.name)})") if names.count(job.name) > 1 else job
        for place, job in enumerate(jobs)
    ]


def _with_the_best(places: Sequence[Place]) -> list[Place]:
    def _beats(one: Place, other: Place) -> bool:
        no_worse = one.bytes <= other.bytes and one.value <= other.value
        return no_worse and (one.bytes < other.bytes or one.value < other.value)

    return [replace(place, is_best=not any(_beats(other, place) for other in places)) for place in places]


def _row(entry: Entry, texts: Sequence[ScoredText], tasks: Sequence[tuple[str, int | None, str, int]]) -> tuple[str, ...]:
    bits = entry.bits
    cells = [entry.name if entry.method else f"{entry.model}, {UNCOMPRESSED}", entry.method]
    cells += ["", ""] if bits is None else [f"{bits.per_weight:.3f}", f"{bits.per_model_parameter:.3f}"]
    cells.append("" if entry.bytes is None else size(entry.bytes))
    for text in texts:
        found = next((c for c in entry.figures.corpora if _text_of(c) == text), None)
        cells.append("" if found is None or found.perplexity is None else f"{found.perplexity:.4g}")
        cells.append("" if found is None or found.kl_divergence is None else f"{found.kl_divergence:.4g}")
    for key in tasks:
        task = next((t for t in entry.figures.tasks if _metric_of(t) == key), None)
        cells.append("" if task is None or task.value is None else f"{task.value:.4g}")
    cells += [entry.certificate, "" if entry.cpu_seconds is None else f"{entry.cpu_seconds:.1f} s"]
    return tuple(cells)


def _scatter(plane: Plane) -> list[str]:
    """A drawing in characters: size to the right, the figure upwards, a letter for each entry, + where two of them meet."""
    low, high = min(p.value for p in plane.places), max(p.value for p in plane.places)
    small, large = min(p.bytes for p in plane.places), max(p.bytes for p in plane.places)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    legend = []
    for place in plane.places:
        mark = _MARKS[place.number % len(_MARKS)]
        column = round((place.bytes - small) / ((large - small) or 1) * (_WIDTH - 1))
        line = round((high - place.value) / ((high - low) or 1) * (_HEIGHT - 1))
        grid[line][column] = mark if grid[line][column] == " " else "+"
        star = " *" if place.is_best else ""
        name = place.entry.name if place.entry.method else f"{place.entry.model}, {UNCOMPRESSED}"
        legend.append(f"  {mark}  {name}: {size(place.bytes)}, {place.value:.4g}{star}")
    ticks = [f"{high:.4g}", *[""] * (_HEIGHT - 2), f"{low:.4g}"]
    margin = max(map(len, ticks))
    drawn = [f"{tick:>{margin}} |{''.join(cells).rstrip()}" for tick, cells in zip(ticks, grid, strict=True)]
    foot = f"{'':>{margin}} +{'-' * _WIDTH}"
    ends = f"{'':>{margin}}  {size(small)}{size(large):>{max(_WIDTH - len(size(small)), 1)}}"
    return [plane.title, *drawn, foot, ends, *legend, "  * none is both smaller and better" if legend else ""]


def safe_name(text: str) -> str:
    """A text as the id of a section."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
