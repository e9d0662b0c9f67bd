"""What a person reads when a job has ended: as tables on a terminal, as plain lines otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jobs.estimation.prediction import Prediction
from jobs.logs import duration
from jobs.manifest import Lineage, StageRecord
from jobs.reporting.certificate import FormatCertificate
from jobs.scoring.figures import Figures, Interval, with_error


@dataclass(frozen=True, kw_only=True)
class BitAccount:
    """Where the bits of a compressed model go.

    ``components`` are total bits by name, ``parameters`` the number of compressed weights. ``model_parameters`` counts all
    parameters of the model; those that are not compressed are stored in 16 bits. ``added`` are the bits of parameters that the
    original does not have: a head that is no longer tied, for instance.
    """

    components: Mapping[str, float]
    parameters: float
    model_parameters: int
    added: float = 0.0

    @property
    def per_weight(self) -> float:
        """Bits of one compressed weight, codebooks and scales included."""
        return sum(self.components.values()) / self.parameters

    @property
    def total(self) -> float:
        """All bits that are stored, those of what is not compressed included."""
        rest = max(self.model_parameters - self.parameters, 0)
        return sum(self.components.values()) + 16 * rest + self.added

    @property
    def per_model_parameter(self) -> float:
        """Bits of one parameter of the whole model."""
        return self.total / self.model_parameters

    @property
    def parts(self) -> dict[str, float]:
        """Bits of one compressed weight by component."""
        return {name: bits / self.parameters for name, bits in self.components.items()}

    @classmethod
    def of(cls, bits: Mapping[str, float], model_parameters: int) -> BitAccount | None:
        """From what ``CompressionAlgorithm.bits`` gives; None where nothing is compressed."""
        components = {name: value for name, value in bits.items() if name not in ("parameters", "added")}
        if not bits.get("parameters"):
            return None
        return cls(
            components=components,
            parameters=bits["parameters"],
            model_parameters=model_parameters,
            added=bits.get("added", 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """What something cost, what it was expected to, and whether it ran or an earlier result was there."""

    ran: bool
    wall_s: float
    user_cpu_s: float
    peak_memory_bytes: int
    peak_cuda_memory_bytes: int | None = None
    predicted: Prediction | None = None

    @classmethod
    def of(cls, cost: Mapping[str, Any], predicted: Mapping[str, Any] | None, *, ran: bool) -> CostRow:
        """From what the manifest keeps."""
        return cls(**cost, predicted=None if predicted is None else Prediction.from_record(predicted), ran=ran)

    @classmethod
    def of_stage(cls, record: StageRecord, *, ran: bool) -> CostRow:
        """From a stage's record."""
        return cls(
            wall_s=record.wall_s,
            user_cpu_s=record.user_cpu_s,
            peak_memory_bytes=record.peak_memory_bytes,
            peak_cuda_memory_bytes=record.peak_cuda_memory_bytes,
            predicted=record.predicted,
            ran=ran,
        )

    def cells(self, name: str) -> tuple[str, ...]:
        """A row of the table: predicted -> actual, and what the prediction was made from."""
        expected = self.predicted
        return (
            name,
            "ran" if self.ran else "reused",
            _expected(expected and duration(expected.wall_s)) + duration(self.wall_s),
            _expected(expected and duration(expected.user_cpu_s)) + duration(self.user_cpu_s),
            _expected(expected and memory(expected)) + memory(self),
            "" if expected is None else expected.basis.value,
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All that the closing summary says.

    Sizes in bytes, ``further_sizes`` those of the formats after the first; ``stages`` by name, with ``ran`` those of this run;
    ``closing`` are certificate and evaluation. ``data`` is the text that each stage was given. ``lineage`` says how earlier
    jobs have made ``model``: sizes and figures before compression are those of ``model`` all the same.
    """

    model: str
    method: str
    output: Path
    bits: BitAccount | None
    size_before: int
    size_after: int | None
    figures: Figures
    certificates: Sequence[FormatCertificate]
    stages: Mapping[str, StageRecord]
    ran: Sequence[str]
    data: Mapping[str, str] = field(default_factory=dict)
    further_sizes: Mapping[str, int] = field(default_factory=dict)
    lineage: Lineage | None = None
    closing: Mapping[str, CostRow] = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str]]:
        """Label and value of each line above the tables."""
        lines = [("model", self.model)]
        if self.lineage is not None:
            lines.append(("made from", f"{self.lineage}; sizes and figures before are {self.model}'s"))
        lines.append(("method", self.method))
        if self.bits is not None:
            parts = ", ".join(f"{name} {bits:.3f}" for name, bits in self.bits.parts.items())
            lines.append(("bits per compressed weight", f"{self.bits.per_weight:.3f} ({parts})"))
            lines.append(("bits per parameter of the model", f"{self.bits.per_model_parameter:.3f}"))
        if self.size_after is not None:
            lines.append(("weights on disk", self._shrunk_to(self.size_after)))
        lines.extend((f"weights on disk, {name}", self._shrunk_to(count)) for name, count in self.further_sizes.items())
        lines.extend((f"certificate, {c.format}", f"{c.verdict.value}: {c.reason}") for c in self.certificates)
        lines.append(("output", str(self.output)))
        return lines

    def _shrunk_to(self, count: int) -> str:
        ratio = self.size_before / count if count else 0
        return f"{size(self.size_before)} -> {size(count)} ({ratio:.2f} times smaller)"

    def figure_rows(self) -> list[tuple[str, ...]]:
        """One row a text: sequence length, windows, tokens, perplexity before and after, KL, top-1 agreement."""
        return [
            (
                f.corpus,
                str(f.sequence_length),
                str(f.windows),
                str(f.tokens),
                f"{f.base_perplexity:.4g}" + ("" if f.perplexity is None else f" -> {f.perplexity:.4g}"),
                "" if f.kl_divergence is None else f"{f.kl_divergence:.4g}{_between(f.kl_interval, '.3g')}",
                "" if f.top1_agreement is None else f"{f.top1_agreement:.1%}{_between(f.top1_interval, '.1%')}",
            )
            for f in self.figures.corpora
        ]

    def task_rows(self) -> list[tuple[str, ...]]:
        """One row a metric of a task: examples before a question, samples, BOS, metric, value before and after."""
        return [
            (
                f.task,
                "" if f.num_fewshot is None else str(f.num_fewshot),
                str(f.samples) + (f", {f.truncated} cut" if f.truncated else ""),
                "" if f.bos_added is None else "yes" if f.bos_added else "no",
                f.metric,
                " -> ".join(with_error(v, e) for v, e in ((f.base_value, f.base_error), (f.value, f.error)) if v is not None),
            )
            for f in self.figures.tasks
        ]

    def stage_rows(self) -> list[tuple[str, ...]]:
        """One row a stage, and one each for what follows: what happened, wall time, user CPU time and peak memory."""
        stages = {name: CostRow.of_stage(record, ran=name in self.ran) for name, record in self.stages.items()}
        return [row.cells(name) for name, row in {**stages, **self.closing}.items()]


FIGURE_COLUMNS = ("text", "sequence length", "windows", "tokens", "perplexity", "KL (nats, 95 %)", "same first choice (95 %)")
TASK_COLUMNS = ("task", "examples", "samples", "BOS", "metric", "value")
STAGE_COLUMNS = ("stage", "", "time", "CPU", "peak memory", "predicted from")


def memory(cost: CostRow | Prediction) -> str:
    """Peak memory, and that of the device where there is one."""
    on_device = cost.peak_cuda_memory_bytes
    return size(cost.peak_memory_bytes) + ("" if on_device is None else f" + {size(on_device)} on the device")


def _expected(text: str | None) -> str:
    return f"{text} -> " if text else ""


def as_tables(summary: Summary) -> Group:
    """The summary as rich tables."""
    facts = Table.grid(padding=(0, 2))
    for label, value in summary.facts():
        facts.add_row(Text(label, style="bold"), Text(value))
    parts: list[Table] = [facts]
    for header, rows in _tables(summary):
        if rows:
            table = Table(*header)
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            parts.append(table)
    return Group(*parts)


def as_text(summary: Summary) -> str:
    """The summary as plain lines, columns aligned by spaces."""
    lines = aligned(summary.facts())
    for header, rows in _tables(summary):
        if rows:
            lines += ["", *aligned([header, *rows])]
    return "\n".join(lines)


def _tables(summary: Summary) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    return [(FIGURE_COLUMNS, summary.figure_rows()), (TASK_COLUMNS, summary.task_rows()), (STAGE_COLUMNS, summary.stage_rows())]


def _between(interval: Interval | None, spec: str) -> str:
    return "" if interval is None else f" ({interval[0]:{spec}} to {interval[1]:{spec}})"


def size(count: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, columns aligned by spaces."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
