"""What each command of the command line does. Torch is imported only by those that need a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from algorithms.registry import config_class, rows
from configs.errors import MemoryShortageError, RecipeError, RecipeProblem
from configs.loader import BLOCK, LoadedRecipe, load_recipe
from jobs.command_line.arguments import Arguments
from jobs.command_line.listing import JobEntry, list_jobs

OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


def perform(arguments: Arguments) -> None:
    """Do what the command line asks for, recipe after recipe; the first failure ends it.

    Raises:
        RecipeError: a recipe does not hold; nothing of any recipe has been done then.
        DataError: data, a model or a path that the user can put right.
        MissingEnvironmentError: something that this machine lacks.
        MemoryShortageError: a job did not fit into memory.
        CertificateError: a written format is not what its client reads.
    """
    if arguments.command == "ls":
        _list(arguments)
        return
    action = _ACTIONS[arguments.command]
    for loaded in _load(arguments):
        with _naming_remedies(loaded):
            action(loaded, arguments)


def _load(arguments: Arguments) -> list[LoadedRecipe]:
    """All recipes, before any of them runs: a typing error in the last should not wait for the first to finish."""
    loaded: list[LoadedRecipe] = []
    problems: list[RecipeProblem] = []
    for file in arguments.files:
        try:
            loaded.append(load_recipe(file.path, arguments.overrides, plugin_config=config_class, as_json=file.as_json))
        except RecipeError as error:
            problems.extend(problem for problem in error.problems if problem not in problems)
    if problems:
        raise RecipeError(problems)
    return loaded


def _run(loaded: LoadedRecipe, arguments: Arguments) -> None:
    from jobs.runner import run_job

    run_job(loaded)


def _plan(loaded: LoadedRecipe, arguments: Arguments) -> None:
    from jobs.logs import Terminal
    from jobs.runner import plan_job

    plan = plan_job(loaded)
    Terminal().show(plan.as_table(), plan.as_text())


def _evaluate(loaded: LoadedRecipe, arguments: Arguments) -> None:
    from jobs.runner import evaluate_only

    evaluate_only(loaded, arguments.directory)


def _validate(loaded: LoadedRecipe, arguments: Arguments) -> None:
    recipe = loaded.recipe
    lines = [f"{loaded.file}: valid; {recipe.algorithm} on {recipe.model}, job folder {recipe.job_folder}"]
    _say([*lines, *(f"  warning: {warning}" for warning in loaded.warnings)])


_ACTIONS: Mapping[str, Callable[[LoadedRecipe, Arguments], None]] = {
    "run": _run,
    "plan": _plan,
    "evaluate": _evaluate,
    "validate": _validate,
}


def _list(arguments: Arguments) -> None:
    jobs = list_jobs(arguments.user_folder)
    algorithms = [f"  {row.name:<16}{row.summary}" for row in rows()]
    listed = [line for job in jobs for line in _job_lines(job)] or ["  none"]
    _say(["algorithms", *algorithms, "", f"jobs below {arguments.user_folder}", *listed])


def _job_lines(job: JobEntry) -> list[str]:
    stages = ", ".join(f"{stage} {status}" for stage, status in job.stages.items())
    return [f"  {job.name}  {job.algorithm}  {job.status}", *([f"      {stages}"] if stages else [])]


def _say(lines: list[str]) -> None:
    """Write a command's answer. Jobs talk through jobs.logs, which imports torch; these answers should not wait for it."""
    sys.stdout.write("\n".join(lines) + "\n")


@contextmanager
def _naming_remedies(loaded: LoadedRecipe) -> Iterator[None]:
    """Turn the several ways of running out of memory into one error that names the overrides that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_memory_shortage(error):
            raise
        raise MemoryShortageError(_remedies(loaded, error)) from error


def _is_memory_shortage(error: MemoryError | RuntimeError) -> bool:
    """Whether torch or Python ran out of memory. Torch's CPU allocator raises a plain RuntimeError, told by its words."""
    kind = type(error)
    by_type = isinstance(error, MemoryError) or (kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"))
    return by_type or any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


def _remedies(loaded: LoadedRecipe, error: BaseException) -> str:
    overrides = loaded.parameters.memory_remedies()
    lines = [f"{loaded.file}: the job ran out of memory ({' '.join(str(error).split())[:200] or type(error).__name__})."]
    if overrides:
        lines.append("What is finished is kept. Run the same command again with one of these, the first that you can:")
        lines.extend(f"  {BLOCK}.{loaded.recipe.algorithm}.{override}" for override in overrides)
    else:
        lines.append("What is finished is kept. Run the same command again on a machine with more memory.")
    return "\n".join(lines)
