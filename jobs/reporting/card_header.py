"""The YAML header of a model card, in the hub's own words: what the model came from, how it is licensed, what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from configs.names import EXPORTS
from jobs.manifest import StageRecord
from jobs.scoring.figures import CorpusFigures, Figures, TaskFigures

TASK = {"type": "text-generation", "name": "Text Generation"}
# What loads a format, where it is not transformers.
LIBRARIES: Mapping[str, str] = {
    "gguf": "gguf",
    "qserve": "qserve",
    "spqr": "bitpress",
    "spqr-tiles": "spqr_quant",
    "tensorrt-llm": "tensorrt-llm",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_CARRIED = ("license", "license_name", "license_link", "language")
_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One figure of the compressed model: of which data, by which metric, and what it depends on."""

    dataset: str
    metric: str
    name: str
    value: float
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from.

    ``relation`` is the hub's word for what was done to it. ``carried`` are entries of its own card that hold for the result,
    ``datasets`` the hub's data sets that the stages were given.
    """

    relation: str = "quantized"
    carried: Mapping[str, object] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()


def card_header(
    *, name: str, base: str, first_format: str | None, tags: Sequence[str], origin: Origin, results: Sequence[Measured]
) -> dict[str, object]:
    """The header as a mapping.

    Args:
        name: of the result, for the hub's table of results.
        base: the model that it was made from.
        first_format: the format that stands in the folder itself.
        tags: words for the hub's search.
        origin: where the model comes from.
        results: what was measured.
    """
    header: dict[str, object] = {}
    if is_hub_id(base):
        header |= {"base_model": base, "base_model_relation": origin.relation}
    header |= {"library_name": LIBRARIES.get(first_format or "", "transformers"), "pipeline_tag": TASK["type"]}
    header |= origin.carried
    if origin.datasets:
        header["datasets"] = list(origin.datasets)
    header["tags"] = list(tags)
    if results:
        header["model-index"] = [{"name": name, "results": _index(results)}]
    return header


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be one of the hub's, and is no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).is_dir()


def results_of(figures: Figures) -> tuple[Measured, ...]:
    """Perplexity, divergence and agreement of each text, the sequence length in their names, and the metrics of tasks."""
    texts = [result for one in figures.corpora for result in _results_on(one)]
    return (*texts, *(_result_of(one) for one in figures.tasks if one.value is not None))


def origin_of(folder: Path, stages: Iterable[StageRecord], relation: str) -> Origin:
    """What a model's own folder and the stages' records say.

    Args:
        folder: of the uncompressed model; its card may be missing, and an earlier job's stands above its ``exports/``.
        stages: the records of the stages that made the result.
        relation: the hub's word for what they did.
    """
    above = [folder.parent.parent] if folder.parent.name == EXPORTS else []
    cards = (_header_of(place / _CARD) for place in (folder, *above))
    card = next((found for found in cards if found), {})
    texts = [text for stage in stages if isinstance(text := stage.tokens.get("text"), Mapping)]
    names = [str(text["name"]) for text in texts if text.get("kind") == "hub" and "files" not in text]
    return Origin(
        relation=relation,
        carried={key: card[key] for key in _CARRIED if _is_words(card.get(key))},
        datasets=tuple(dict.fromkeys(name for name in names if _HUB_ID.fullmatch(name))),
    )


def _results_on(figures: CorpusFigures) -> list[Measured]:
    arguments = {
        "sequence_length": figures.sequence_length,
        "windows": figures.windows,
        "tokens": figures.tokens,
        "base_perplexity": _rounded(figures.base_perplexity),
    }
    found = (
        ("perplexity", "perplexity", figures.perplexity),
        ("kl_divergence", "KL divergence to the base model, nats a token", figures.kl_divergence),
        ("top1_agreement", "same first choice as the base model", figures.top1_agreement),
    )
    length = f"sequence length {figures.sequence_length}"
    return [
        Measured(dataset=figures.corpus, metric=metric, name=f"{what} ({length})", value=value, arguments=arguments)
        for metric, what, value in found
        if value is not None
    ]


def _result_of(figures: TaskFigures) -> Measured:
    """A metric of a task; its name says how many examples stood before each question."""
    assert figures.value is not None
    arguments = {
        "num_few_shot": figures.num_fewshot,
        "samples": figures.samples,
        "bos_added": figures.bos_added,
        "standard_error": figures.error,
        "base_value": figures.base_value,
    }
    shots = "" if figures.num_fewshot is None else f" ({figures.num_fewshot}-shot)"
    return Measured(
        dataset=figures.task,
        metric=figures.metric.partition(",")[0],
        name=f"{figures.metric}{shots}",
        value=figures.value,
        arguments={name: value for name, value in arguments.items() if value is not None},
    )


def _index(results: Sequence[Measured]) -> list[dict[str, object]]:
    """An entry for each data set, with all that was measured on it."""
    entries = []
    for dataset in dict.fromkeys(result.dataset for result in results):
        metrics = [
            {"type": r.metric, "name": r.name, "value": _rounded(r.value), "args": dict(r.arguments)}
            for r in results
            if r.dataset == dataset
        ]
        entries.append({"task": dict(TASK), "dataset": {"type": dataset, "name": dataset}, "metrics": metrics})
    return entries


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _header_of(card: Path) -> Mapping[str, object]:
    """The header of a card; nothing where there is no card, or none that can be read."""
    try:
        lines = card.read_text(encoding="utf-8-sig").splitlines()
        if not lines or lines[0].strip() != "---":
            return {}
        end = next((place for place, line in enumerate(lines[1:], 1) if line.strip() == "---"), 0)
        header = yaml.safe_load("\n".join(lines[1:end]))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return header if isinstance(header, Mapping) else {}


def _is_words(value: object) -> bool:
    """Whether a value is a text or a list of texts, as these entries have to be."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value))
