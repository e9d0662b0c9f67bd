"""What an evaluation comes to: figures on texts and on tasks, as values, records and lines.

The sequence length is part of every figure on a text: the same model has another perplexity at another length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class CorpusFigures:
    """Figures on one text: ``windows`` of ``sequence_length`` tokens, ``tokens`` of them predicted.

    ``perplexity`` is the compressed model's, None where only the uncompressed one was scored. ``kl_divergence`` is the mean
    over predicted tokens of KL(uncompressed, compressed) in nats, ``top1_agreement`` the share of them with the same first
    choice; both None where they were not asked for. Intervals are 95 % bootstrap intervals over windows;
    ``ratio_interval`` is that of perplexity over base_perplexity, whose windows are paired. Models computed in ``dtype``;
    ``text`` is the beginning of the tokens' digest.
    """

    corpus: str
    sequence_length: int
    windows: int
    tokens: int
    base_perplexity: float
    perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None
    base_perplexity_interval: Interval | None = None
    perplexity_interval: Interval | None = None
    kl_interval: Interval | None = None
    top1_interval: Interval | None = None
    ratio_interval: Interval | None = None
    dtype: str = "float32"
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one model came to on one task: ``metrics`` by name, each a value and, where there is one, its standard error.

    ``bos_added`` says whether the beginning-of-sequence token stood before each text: it moves results more than many a
    compression. None where the task has a rule of its own. ``truncated`` prompts were longer than the model takes, so that
    their beginning was cut off.
    """

    task: str
    num_fewshot: int | None
    samples: int
    metrics: Mapping[str, tuple[float, float | None]]
    bos_added: bool | None = None
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """One metric of one task, of the uncompressed and of the compressed model; either may not have been asked for."""

    task: str
    num_fewshot: int | None
    metric: str
    samples: int
    bos_added: bool | None = None
    base_value: float | None = None
    base_error: float | None = None
    value: float | None = None
    error: float | None = None
    truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All that was measured."""

    corpora: tuple[CorpusFigures, ...] = ()
    tasks: tuple[TaskFigures, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.corpora or self.tasks)


def side_by_side(base: TaskResult | None, model: TaskResult | None) -> tuple[TaskFigures, ...]:
    """The metrics of one task for both models; one of them may be missing."""
    known = model or base
    assert known is not None, "one of the two was measured"
    found = []
    for metric in known.metrics:
        before = (None, None) if base is None else base.metrics.get(metric, (None, None))
        after = (None, None) if model is None else model.metrics[metric]
        found.append(
            TaskFigures(
                task=known.task,
                num_fewshot=known.num_fewshot,
                metric=metric,
                samples=known.samples,
                bos_added=known.bos_added,
                truncated=known.truncated,
                base_value=before[0],
                base_error=before[1],
                value=after[0],
                error=after[1],
            )
        )
    return tuple(found)


def describe(figures: CorpusFigures) -> str:
    """One line: what, on how much text, at which sequence length."""
    text = f"{figures.corpus} perplexity {figures.base_perplexity:.4g}"
    if figures.perplexity is not None:
        text += f" -> {figures.perplexity:.4g}"
    if figures.kl_divergence is not None:
        text += f", KL {figures.kl_divergence:.4g} nats, same first choice {figures.top1_agreement:.1%}"
    return f"{text} (sequence length {figures.sequence_length}, {figures.windows} windows, {figures.tokens} tokens)"


def describe_task(figures: TaskFigures) -> str:
    """One line: which metric of which task, with how many examples before each question."""
    sides = ((figures.base_value, figures.base_error), (figures.value, figures.error))
    values = " -> ".join(with_error(value, error) for value, error in sides if value is not None)
    shots = "" if figures.num_fewshot is None else f"{figures.num_fewshot} examples, "
    bos = "" if figures.bos_added is None else f", {'with' if figures.bos_added else 'without'} BOS"
    cut = f", {figures.truncated} of them cut" if figures.truncated else ""
    return f"{figures.task} {figures.metric} {values} ({shots}{figures.samples} samples{cut}{bos})"


def with_error(value: float, error: float | None) -> str:
    """A value, with its standard error where there is one."""
    return f"{value:.4g}" + (f" ± {error:.2g}" if error else "")


def as_records(figures: Figures) -> dict[str, list[dict[str, object]]]:
    """The figures as the manifest keeps them."""
    return {"figures": [asdict(found) for found in figures.corpora], "tasks": [asdict(found) for found in figures.tasks]}


def from_records(record: Mapping[str, Any]) -> Figures:
    """The figures that :func:`as_records` wrote; from before there were tasks or intervals, too."""
    return Figures(
        corpora=tuple(corpus_from(entry) for entry in record["figures"]),
        tasks=tuple(TaskFigures(**entry) for entry in record.get("tasks", ())),
    )


def corpus_from(record: Mapping[str, Any]) -> CorpusFigures:
    """Figures on a text from their JSON, where pairs are lists."""
    return CorpusFigures(**{name: _pair(value) for name, value in record.items()})


def task_result_from(record: Mapping[str, Any]) -> TaskResult:
    """A task's result from its JSON."""
    return TaskResult(**{**record, "metrics": {name: _pair(value) for name, value in record["metrics"].items()}})


def _pair(value: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
