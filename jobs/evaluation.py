"""What EVALUATION asks for, measured on a compressed model beside the uncompressed one.

Perplexity, KL divergence and top-1 agreement are taken from both models on the same windows in one pass, block by block where
the models allow it; tasks from one model after the other. Whatever is finished is remembered at once, so that an evaluation
that was stopped goes on with the next text or task.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.base import Progress
from algorithms.modeling.files import atomic_write_json, atomic_write_text, file_digest
from algorithms.modeling.lockstep import free_bytes
from algorithms.modeling.on_demand import held, place, shelf_of
from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from configs.names import TaskRequest
from configs.recipe import CHUNKED, EvaluationConfig, Recipe
from jobs.execution.collaborators import Collaborators
from jobs.results.artifacts import canonical_digest
from jobs.scoring.figures import (
    CorpusFigures,
    Figures,
    TaskFigures,
    TaskResult,
    corpus_from,
    describe,
    describe_task,
    side_by_side,
    task_result_from,
)
from jobs.scoring.harness import Harness
from jobs.workspace import Workspace

logger = logging.getLogger(__name__)

BASE = "base"
RESULTS = "evaluation.json"  # of an evaluation by itself
_SHORT = 12  # characters of a text's digest that tell it from others of its name
_HELD_SHARE = 0.8  # of the free memory, which a model that answers tasks may take


class IncompleteEvaluationError(DataError):
    """Some tasks could not be run. ``figures`` are all others."""

    def __init__(self, message: str, figures: Figures) -> None:
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What a model is scored on: texts by name, [n] int64 token ids cut to what the recipe allows, and tasks.

    ``tasks`` are digests of what each task asks, by the task as the recipe has it; ``chunked`` is the text of gptq_wikitext,
    where it is among them.
    """

    settings: EvaluationConfig
    tokens: Mapping[str, Tensor]
    tasks: Mapping[str, str] = field(default_factory=dict)
    chunked: Tensor | None = None

    def key(self, model_key: str | None) -> str:
        """Names a result: the model, the settings and every token. None as model: the uncompressed one alone."""
        texts = {name: _digest(tokens) for name, tokens in self.tokens.items()}
        asked = [texts, dict(self.tasks), _digest(self.chunked)]
        return canonical_digest([model_key, self.settings.model_dump(mode="json"), asked])


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Results of single texts and tasks, by key: what is in ``known`` is not measured again.

    ``keep`` is told the rest: its key, the key of the model that it speaks of, and the result.
    """

    known: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    keep: Callable[[str, str, Mapping[str, object]], None] = lambda key, subject, record: None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is scored: ``key`` names its content, ``label`` its folder among the results. It is opened when needed."""

    key: str
    label: str
    open: Callable[[], nn.Module]

    @cached_property
    def model(self) -> nn.Module:
        """The model, opened once."""
        return self.open()


def load_questions(
    settings: EvaluationConfig, parts: Collaborators, sources: Sources, positions: int | None = None
) -> Questions:
    """Read and check the texts and tasks of EVALUATION, before any work is done.

    Args:
        settings: the recipe's block.
        parts: finds the tasks.
        sources: where texts come from.
        positions: the longest sequence that the model was made for, where it says so.

    Raises:
        DataError: a text is too short for one window, or a task cannot be found.
        MissingEnvironmentError: tasks without lm-eval.
    """
    length = settings.sequence_length
    if settings.corpora and positions is not None and length > positions:
        logger.warning("EVALUATION.sequence_length %d is longer than the %d tokens the model was made for.", length, positions)
    tokens = {}
    for name in settings.corpora:
        found = sources.corpus(name)
        tokens[name] = found[: settings.max_tokens]
        if tokens[name].numel() < length:
            raise DataError(
                f"EVALUATION: {name} has {found.numel()} tokens"
                + (f" of which max_tokens keeps {tokens[name].numel()}" if tokens[name].numel() < found.numel() else "")
                + f"; one window of sequence_length {length} needs {length}. Lower EVALUATION.sequence_length."
            )
    requests = [request for request in settings.requests if request.name != CHUNKED]
    if requests and settings.apply_chat_template and not getattr(sources.tokenizer(), "chat_template", None):
        raise DataError("EVALUATION.apply_chat_template: the model's tokenizer has no chat template; set it to false.")
    tasks = parts.harness(settings, sources.cache_dir).check(requests)
    chunked = sources.chunked() if any(request.name == CHUNKED for request in settings.requests) else None
    return Questions(settings=settings, tokens=tokens, tasks=tasks, chunked=chunked)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where texts come from: ``corpus`` gives the tokens of one by its name, ``chunked`` those of gptq_wikitext.

    ``tokenizer`` is the model's.
    """

    corpus: Callable[[str], Tensor]
    chunked: Callable[[], Tensor]
    tokenizer: Callable[[], object]
    cache_dir: Path

    @classmethod
    def of(cls, parts: Collaborators, recipe: Recipe, source: ModelSource, workspace: Workspace) -> Sources:
        """Those of a recipe, for the tokenizer of a model."""
        return cls(
            corpus=lambda name: parts.corpus_tokens(name, recipe, source, workspace),
            chunked=lambda: parts.chunked_wikitext(recipe, source, workspace),
            tokenizer=source.tokenizer,
            cache_dir=workspace.cache_dir,
        )


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Scores models. ``tokenizer`` is opened for tasks alone; task results are also written as files below ``folder``."""

    questions: Questions
    parts: Collaborators
    progress: Progress
    folder: Path
    cache_dir: Path
    tokenizer: Callable[[], object]
    memory: Memory = field(default_factory=Memory)
    note: Callable[[Mapping[str, object]], None] = lambda record: None

    def score(self, base: Subject | None, model: Subject | None) -> Figures:
        """Both models on every text and task; either may be left out, and on texts a model alone counts as the base.

        Every result is given to ``note`` as a record, and in a line to the log.

        Raises:
            IncompleteEvaluationError: a task could not be run; the error has what the others came to.
        """
        first = base or model
        assert first is not None, "there is something to score"
        second = None if base is None else model
        corpora, tasks, failed = [], [], []
        with self.progress("evaluation", len(self.questions.tokens) + len(self.questions.settings.requests)) as step:
            for name, tokens in self.questions.tokens.items():
                corpora.append(self._corpus(name, tokens, first, second))
                self.note(asdict(corpora[-1]))
                step(describe(corpora[-1]))
            for request in self.questions.settings.requests:
                try:
                    found = self._task(request, base, model)
                except DataError as error:  # the others are worth having all the same
                    logger.error("%s", error)
                    failed.append(str(error))
                    step(f"{request} failed")
                    continue
                for figures in found:
                    self.note(asdict(figures))
                tasks += found
                step("; ".join(map(describe_task, found)))
        measured = Figures(corpora=tuple(corpora), tasks=tuple(tasks))
        if failed:
            raise IncompleteEvaluationError("\n".join(failed), measured)
        return measured

    @cached_property
    def _harness(self) -> Harness:
        """One for all tasks: it reads lm-eval's index, which takes seconds, once."""
        return self.parts.harness(self.questions.settings, self.cache_dir)

    def _corpus(self, name: str, tokens: Tensor, base: Subject, model: Subject | None) -> CorpusFigures:
        settings = self.questions.settings
        shaping = [
            base.key,
            model and model.key,
            settings.sequence_length,
            settings.kl_divergence,
            settings.dtype,
            _digest(tokens),
        ]
        key = canonical_digest(["corpus", name, *shaping])
        if key in self.memory.known:
            return corpus_from(self.memory.known[key])
        found = _score_text(name, tokens, settings, base.model, None if model is None else model.model, self.parts)
        self.memory.keep(key, (model or base).key, asdict(found))
        return found

    def _task(self, request: TaskRequest, base: Subject | None, model: Subject | None) -> tuple[TaskFigures, ...]:
        before = {} if base is None else self._results(request, base)
        after = {} if model is None else self._results(request, model)
        return tuple(
            figures for name in dict.fromkeys([*after, *before]) for figures in side_by_side(before.get(name), after.get(name))
        )

    def _results(self, request: TaskRequest, subject: Subject) -> dict[str, TaskResult]:
        """Name -> result of every task that the request stands for."""
        settings, chunked = self.questions.settings, self.questions.chunked
        shaping = _digest(chunked) if request.name == CHUNKED else [*_shaping(settings), self.questions.tasks[str(request)]]
        key = canonical_digest(["task", str(request), subject.key, settings.dtype, shaping])
        folder = self.folder / subject.label / request.name
        known = self.memory.known.get(key)
        if known is not None and known["digest"] == _file_digest(folder / str(known["file"])):
            return {result.task: result for result in map(task_result_from, known["results"])}
        if request.name == CHUNKED:
            found = [self._chunked(subject, folder)]
        else:
            with _ready_to_answer(subject.model):
                found = list(self._harness.run(request, subject.model, self.tokenizer(), folder))
        file = max(folder.glob("results*.json"), key=lambda path: path.stat().st_mtime_ns)
        record = {"results": [asdict(result) for result in found], "file": file.name, "digest": _file_digest(file)}
        self.memory.keep(key, subject.key, record)
        return {result.task: result for result in found}

    def _chunked(self, subject: Subject, folder: Path) -> TaskResult:
        """gptq_wikitext; results.txt has the value that nyuntam prints, which is a mean of running perplexities."""
        assert self.questions.chunked is not None
        bos = getattr(self.tokenizer(), "bos_token_id", None)
        found = self.parts.chunked_perplexity(subject.model, self.questions.chunked, bos)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_json(
            folder / "results.json",
            {
                "ppl": found.value,
                "ppl_nyuntam_mean_of_running": found.mean_of_running,
                "n_chunks": found.chunks,
                "scored_tokens": found.scored_tokens,
                "context": found.context,
                "bos_token_id": bos,
                "ppl_interval_95": found.interval,
            },
        )
        atomic_write_text(folder / "results.txt", f"Perplexity: {found.mean_of_running}\n")
        return TaskResult(
            task=CHUNKED,
            num_fewshot=None,
            samples=found.chunks,
            metrics={"ppl": (found.value, None), "ppl_nyuntam_mean_of_running": (found.mean_of_running, None)},
            bos_added=bos is not None,
        )


def placed(model: nn.Module, device: torch.device, settings: EvaluationConfig | None) -> nn.Module:
    """A model where it is to compute, as EVALUATION wants it."""
    return place(model, device, torch.float32 if settings is None else getattr(torch, settings.dtype))


@contextmanager
def _ready_to_answer(model: nn.Module) -> Iterator[None]:
    """Within, all of a model is in memory, if there is room: answering takes thousands of forwards."""
    shelf = shelf_of(model)
    needed = 0 if shelf is None else shelf.dtype.itemsize * sum(parameter.numel() for parameter in shelf.blocks.parameters())
    device = torch.device("cpu") if shelf is None else shelf.device
    if shelf is not None and needed > _HELD_SHARE * free_bytes(device):
        logger.warning(
            "The model's blocks need %.1f GB and do not fit the memory of %s: each forward reads them again, which is slow. "
            "EVALUATION.limit takes fewer samples.", needed / 1e9, device,
        )  # fmt: skip
        yield
        return
    with held(model):
        yield


def _score_text(
    name: str, tokens: Tensor, settings: EvaluationConfig, base: nn.Module, model: nn.Module | None, parts: Collaborators
) -> CorpusFigures:
    length = settings.sequence_length
    if model is not None and settings.kl_divergence:
        both = parts.compare(model, base, tokens, length)
        return CorpusFigures(
            corpus=name,
            sequence_length=length,
            windows=both.perplexity.windows,
            tokens=both.perplexity.scored_tokens,
            base_perplexity=both.base_perplexity.value,
            perplexity=both.perplexity.value,
            kl_divergence=both.kl_divergence,
            top1_agreement=both.top1_agreement,
            base_perplexity_interval=both.base_perplexity.interval,
            perplexity_interval=both.perplexity.interval,
            kl_interval=both.kl_interval,
            top1_interval=both.top1_interval,
            ratio_interval=both.ratio_interval,
            dtype=settings.dtype,
            text=_digest(tokens)[:_SHORT],
        )
    before = parts.perplexity(base, tokens, length)
    after = None if model is None else parts.perplexity(model, tokens, length)
    return CorpusFigures(
        corpus=name,
        sequence_length=length,
        windows=before.windows,
        tokens=before.scored_tokens,
        base_perplexity=before.value,
        base_perplexity_interval=before.interval,
        perplexity=None if after is None else after.value,
        perplexity_interval=None if after is None else after.interval,
        dtype=settings.dtype,
        text=_digest(tokens)[:_SHORT],
    )


def file_memory(path: Path) -> Memory:
    """What an evaluation outside a job remembers: in a file beside its results, until another model or text has its place."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    found = known if isinstance(known, dict) else {}

    def _keep(key: str, subject: str, record: Mapping[str, object]) -> None:
        found[key] = record
        atomic_write_json(path, found)

    return Memory(known=dict(found), keep=_keep)


def _file_digest(path: Path) -> str:
    return file_digest(path) if path.is_file() else ""


def _shaping(settings: EvaluationConfig) -> list[object]:
    """What a task's result depends on, beside the model and the task."""
    return [importlib.metadata.version("lm-eval"), settings.limit, settings.add_bos_token, settings.apply_chat_template]


def _digest(tokens: Tensor | None) -> str:
    return "" if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
