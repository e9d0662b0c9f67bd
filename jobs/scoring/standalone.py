"""Models scored without a recipe: ``main.py evaluate --base_model X --quantized_model Y --tasks gsm8k:5 --results D``.

What is asked becomes a recipe all the same, so that it is checked, and can be overridden, like any other. No job is touched:
results, log and figures go to ``results``, models and data sets of the hub where jobs keep theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from torch import nn

from algorithms.base import Process
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.registry import config_class
from configs.document import COMMAND_LINE
from configs.errors import DataError, RecipeError
from configs.loader import load_recipe
from configs.recipe import Recipe
from jobs.evaluation import BASE, RESULTS, Examiner, Sources, Subject, file_memory, load_questions, placed
from jobs.execution.collaborators import Collaborators
from jobs.execution.interruption import interruptible
from jobs.execution.preparation import versions
from jobs.execution.resources import Meter
from jobs.logs import logging_to
from jobs.manifest import now
from jobs.processes import this_process
from jobs.results.stored_model import StoredModel, find_stored
from jobs.scoring.figures import Figures, as_records, describe, describe_task
from jobs.workspace import Workspace, open_workspace

_CARRIER = "RTN"  # a recipe names an algorithm; none of this one's work is done


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to score. ``label`` is the folder of the compressed model's results; ``tasks`` are "name" or "name:examples".

    ``base`` and ``model`` are hub names, Hugging Face folders or folders of jobs; one of them may be missing.
    """

    base: str | None
    model: str | None
    label: str
    tasks: str
    results: Path
    cache_dir: Path | None = None
    overrides: Sequence[str] = ()


def evaluate_models(request: Request, *, parts: Collaborators | None = None) -> Figures:
    """Score the models; leaves ``<results>/<base or label>/<task>/`` and ``<results>/evaluation.json``.

    Raises:
        RecipeError: tasks or overrides that make no sense.
        DataError: a model, a text or a task that is not there.
        MissingEnvironmentError: lm-eval is not installed.
    """
    parts = parts or Collaborators()
    if (recipe := _as_recipe(request)).evaluation is None or recipe.evaluation.is_empty:
        raise DataError('EVALUATION names nothing to measure; add --tasks "gsm8k:5" or EVALUATION.perplexity=[wikitext2].')
    results = request.results.expanduser().absolute()
    workspace = open_workspace(recipe)
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--results {results}: the folder cannot be made ({error.strerror}). Choose another.") from error
    with logging_to(results, Process(), parts.terminal), interruptible(), Meter() as meter:
        base = None if request.base is None else parts.resolve_model(recipe, workspace)
        source, found = _compressed(request, recipe, workspace, base, parts)
        subject = None if found is None else Subject(key=found.digest, label=request.label, open=_placing(found.open, recipe))
        examiner = Examiner(
            questions=load_questions(recipe.evaluation, parts, Sources.of(parts, recipe, source, workspace)),
            parts=parts,
            progress=parts.terminal.progress,
            folder=results,
            cache_dir=workspace.cache_dir,
            tokenizer=source.tokenizer,
            memory=file_memory(results / ".progress.json"),
        )
        figures = examiner.score(None if base is None else _base(base, recipe, parts), subject)
        record = {"base": request.base, "model": request.model, "versions": versions(1), "time": now()}
        atomic_write_json(results / RESULTS, {**record, **as_records(figures), "cost": asdict(meter.usage())})
        shown = "\n".join([*map(describe, figures.corpora), *map(describe_task, figures.tasks), f"results in {results}"])
        parts.terminal.show(shown, shown)
        return figures


def _base(source: ModelSource, recipe: Recipe, parts: Collaborators) -> Subject:
    return Subject(key=source.digest, label=BASE, open=_placing(lambda: parts.open_source(source), recipe))


def _compressed(
    request: Request, recipe: Recipe, workspace: Workspace, base: ModelSource | None, parts: Collaborators
) -> tuple[ModelSource, StoredModel | None]:
    """The model whose tokenizer reads the texts, and the compressed one, if there is one.

    Raises:
        DataError: the folder holds no model, or the hub has none of that name.
    """
    if request.model is None:
        assert base is not None, "the command line asks for one of them at least"
        return base, None
    folder = Path(request.model).expanduser()
    if not folder.exists():  # a name on the hub, or one that jobs have fetched; otherwise the error says what was tried
        source = parts.resolve_model(recipe.model_copy(update={"model": request.model}), workspace)
        return base or source, StoredModel(open=lambda: parts.open_source(source), digest=source.digest)
    found = find_stored(folder, source=base, parts=parts, trust_remote_code=recipe.trust_remote_code)
    if found is None:
        raise DataError(f"{folder} holds no model: neither a job, nor one of its results, nor a Hugging Face folder.")
    return base or ModelSource(folder.resolve()), found


def _placing(opener: Callable[[], nn.Module], recipe: Recipe) -> Callable[[], nn.Module]:
    return lambda: placed(opener(), this_process.choose_device(Process()), recipe.evaluation)


def _as_recipe(request: Request) -> Recipe:
    given: dict[str, object] = {
        "ALGORITHM": _CARRIER,
        "JOB_ID": "evaluation",
        "EVALUATION": {"tasks": request.tasks},
        "llm": {_CARRIER: {}},
    }
    if (request.base or request.model) is not None:
        given["MODEL"] = request.base or request.model
    if request.cache_dir is not None:
        given["CACHE_PATH"] = str(request.cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "evaluate.yaml"
        path.write_text(yaml.safe_dump(given, allow_unicode=True), encoding="utf-8")
        try:
            return load_recipe(path, request.overrides, plugin_config=config_class).recipe
        except RecipeError as error:  # nobody has seen that file
            raise RecipeError([replace(problem, file=COMMAND_LINE, line=None) for problem in error.problems]) from None
