"""Tasks of lm-eval (EleutherAI's harness), run on a model object, with lm-eval's own JSON and table beside the figures.

Spec 10.3. Whether the beginning-of-sequence token stands before a text is decided here and recorded: gsm8k has been seen at
0.37 with it and at 0.00 without, for the same model.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from algorithms.modeling.files import atomic_write_json, atomic_write_text
from configs.errors import DataError, MissingEnvironmentError
from configs.names import TaskRequest
from configs.recipe import EvaluationConfig
from configs.values import nearest_name
from jobs.results.artifacts import canonical_digest
from jobs.scoring.figures import TaskResult

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

_PACKAGE = "lm-eval"
_INSTALL = 'pip install "lm-eval>=0.4.13,<0.5"'


@dataclass(frozen=True, kw_only=True)
class Harness:
    """lm-eval with the settings of a recipe.

    ``settings`` say where further tasks are, how many samples to take and the batch size; ``cache_dir`` is where data sets are
    kept.
    """

    settings: EvaluationConfig
    cache_dir: Path

    def check(self, requests: Sequence[TaskRequest]) -> dict[str, str]:
        """Find all tasks and fetch their data, so that nothing of it fails after hours of compression.

        Returns:
            Request -> a digest of what it asks: the settings of its tasks and the fingerprints of their data.

        Raises:
            DataError: no such task, or its data cannot be had; says which.
            MissingEnvironmentError: lm-eval is not installed.
        """
        if not requests:
            return {}
        manager, found = self._manager(requests), {}
        for request in requests:
            with datasets_in(self.cache_dir), _told(request):
                tasks = manager.load([request.name])["tasks"]
                for task in tasks.values():  # the first question shows whether texts can be made of the data at all
                    documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
                    for document in itertools.islice(documents or (), 1):
                        task.doc_to_text(document)
                found[str(request)] = canonical_digest([_asked(tasks[name]) for name in sorted(tasks)])
        return found

    def run(
        self, request: TaskRequest, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> tuple[TaskResult, ...]:
        """Run one task or group of tasks.

        Leaves ``results_<n>.json``, ``results_<n>.txt`` (lm-eval's table) and ``samples_<n>.jsonl`` in ``folder``, n being the
        number of examples before each question.

        Args:
            request: the task, and how many examples; None is what the task itself says.
            model: a transformers model in evaluation mode.
            tokenizer: the model's.
            folder: is made.

        Returns:
            The result of the task; of a name that stands for several, of each of these.

        Raises:
            DataError: the task cannot be run.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        wanted = bos_wanted(tokenizer, self.settings.add_bos_token)
        with _hushed():
            client = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.settings.batch_size, add_bos_token=wanted)
        added = starts_with_bos(client.tok_encode("a"), tokenizer)
        if added is not wanted:
            logger.warning(
                "%s: add_bos_token is %s, but the tokenizer %s the token all the same.",
                request.name, str(wanted).lower(), "adds" if added else "does not add",
            )  # fmt: skip
        with datasets_in(self.cache_dir), _told(request), _hushed():
            found = simple_evaluate(
                model=client,
                tasks=[request.name],
                num_fewshot=request.num_fewshot,
                limit=self.settings.limit,
                apply_chat_template=self.settings.apply_chat_template,
                task_manager=self._manager([request]),
            )
        assert found is not None, "only ranks other than the first get nothing"
        _write(found, folder, request)
        cut = _truncated(found, client)
        if cut:
            logger.warning(
                "%s: %d prompts are longer than the %d tokens that the model takes; their beginning was cut off. Ask for fewer "
                "examples.", request, sum(cut.values()), client.max_length,
            )  # fmt: skip
        return tuple(replace(result, truncated=_count(cut, found, result.task)) for result in _results(found, request, added))

    def _manager(self, requests: Sequence[TaskRequest]) -> TaskManager:
        """The recipe's own tasks alone where these are enough: reading lm-eval's index takes seven seconds."""
        own = self._own_tasks
        if own is not None and all(request.name in own.all_tasks for request in requests):
            return own
        known = self._all_tasks.all_tasks
        for request in requests:
            if request.name not in known:
                near = nearest_name(request.name, known)
                raise DataError(
                    f"EVALUATION.tasks: lm-eval has no task {request.name!r}"
                    + (f"; did you mean {near!r}?" if near else ".")
                    + " Tasks of your own are read from the YAML files of EVALUATION.task_folder."
                )
        return self._all_tasks

    @cached_property
    def _own_tasks(self) -> TaskManager | None:
        folder = self.settings.task_folder
        if folder is None:
            return None
        if not folder.expanduser().is_dir():
            raise DataError(f"EVALUATION.task_folder: {folder} is no folder.")
        return self._tasks(include_path=str(folder.expanduser()), include_defaults=False)

    @cached_property
    def _all_tasks(self) -> TaskManager:
        folder = self.settings.task_folder
        return self._tasks(include_path=None if folder is None else str(folder.expanduser()))

    def _tasks(self, **options: str | bool | None) -> TaskManager:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise MissingEnvironmentError(f"EVALUATION.tasks needs the package {_PACKAGE}: {_INSTALL}") from error
        return TaskManager(**options)


def bos_wanted(tokenizer: PreTrainedTokenizerBase, setting: bool | None) -> bool:
    """Whether texts are to begin with BOS: as the recipe says, or else as the tokenizer does of itself."""
    return starts_with_bos(tokenizer("a")["input_ids"], tokenizer) if setting is None else setting


def starts_with_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token ids begin with the tokenizer's BOS."""
    return tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id


@contextmanager
def datasets_in(folder: Path) -> Iterator[None]:
    """Within, ``datasets`` keeps what it loads in ``folder``, for callers that cannot tell it so."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


@contextmanager
def _hushed() -> Iterator[None]:
    """Within, lm-eval's log says errors alone: it warns of every model object and of every number of examples."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _told(request: TaskRequest) -> Iterator[None]:
    """Errors about a task's data as an error that names the task."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, IndexError, TemplateError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = " Its data comes from the hub unless its YAML file says otherwise." if isinstance(error, OSError) else ""
        raise DataError(f"EVALUATION.tasks: {request} cannot be run: {type(error).__name__}: {reason}.{hint}") from error


def _write(found: Mapping[str, Any], folder: Path, request: TaskRequest) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    folder.mkdir(parents=True, exist_ok=True)
    shots = request.num_fewshot if request.num_fewshot is not None else max(found["n-shot"].values(), default=0)
    rest = {name: value for name, value in found.items() if name != "samples"}
    atomic_write_json(
        folder / f"results_{shots}.json", json.loads(json.dumps(rest, default=handle_non_serializable, ensure_ascii=False))
    )
    tables = [make_table(found), *([make_table(found, "groups")] if found.get("groups") else [])]
    atomic_write_text(folder / f"results_{shots}.txt", "\n".join(tables) + "\n")
    lines = [
        json.dumps({"task": name, **sample}, default=handle_non_serializable, ensure_ascii=False)
        for name, samples in found.get("samples", {}).items()
        for sample in samples
    ]
    atomic_write_text(folder / f"samples_{shots}.jsonl", "".join(f"{line}\n" for line in lines))


def _results(found: Mapping[str, Any], request: TaskRequest, bos_added: bool) -> tuple[TaskResult, ...]:
    """A group's own average where there is one, and otherwise each of the tasks that the name stands for."""
    every = found["results"]
    names = [request.name] if request.name in every else list(every)
    return tuple(
        TaskResult(
            task=name,
            num_fewshot=found["n-shot"].get(name, request.num_fewshot),
            samples=_samples(found, name),
            metrics=_metrics(every[name]),
            bos_added=bos_added,
        )
        for name in names
    )


def _asked(task: Task) -> list[object]:
    """What a task asks: its settings, without the addresses of functions in them, and which data."""
    settings = json.dumps(task.dump_config(), default=str, sort_keys=True)
    data = getattr(task, "dataset", None) or {}
    prints = {split: getattr(table, "_fingerprint", "") for split, table in data.items()} if isinstance(data, dict) else {}
    return [re.sub(r"0x[0-9a-f]+", "", settings), prints]


def _truncated(found: Mapping[str, Any], client: HFLM) -> dict[str, int]:
    """Task -> how many of its prompts do not fit the model whole."""
    counts: Counter[str] = Counter()
    for name, samples in found.get("samples", {}).items():
        for sample in samples:
            counts[name] += any(_is_too_long(arguments, client) for arguments in sample["arguments"])
    return {name: count for name, count in counts.items() if count}


def _is_too_long(arguments: Sequence[Any], client: HFLM) -> bool:
    texts = [part for part in arguments if isinstance(part, str)]
    room = client.max_length
    if len(arguments) > 1 and isinstance(arguments[1], Mapping):
        room -= int(arguments[1].get("max_gen_toks", client.max_gen_toks))
    if sum(map(len, texts)) <= room:  # a token is a character at least
        return False
    return len(client.tok_encode("".join(texts))) > room + 1


def _count(counts: Mapping[str, int], found: Mapping[str, Any], name: str) -> int:
    parts = found.get("group_subtasks", {}).get(name, [])
    return counts.get(name, 0) + sum(_count(counts, found, part) for part in parts if part != name)


def _samples(found: Mapping[str, Any], name: str) -> int:
    counts = found["n-samples"]
    inside = [name] if name in counts else found.get("group_subtasks", {}).get(name, [])
    return sum(_samples(found, part) if part not in counts else counts[part]["effective"] for part in inside)


def _metrics(result: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Metric and filter, as lm-eval writes them ("acc,none"), -> value and standard error."""
    found = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = result.get(f"{metric}_stderr,{kind}")
            usable = isinstance(error, int | float) and math.isfinite(error)
            found[key] = (float(value), float(error) if usable else None)
    return found
