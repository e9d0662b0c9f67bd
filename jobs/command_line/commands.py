"""What each command of the command line does. Torch is imported only by those that need a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from algorithms.registry import config_class, rows
from configs.errors import DataError, ExitCode, MissingEnvironmentError, RankFailedError, RecipeError, RecipeProblem, visible
from configs.loader import LoadedRecipe, load_recipe
from jobs.command_line.arguments import COMMANDS, Arguments
from jobs.command_line.listing import JobEntry, list_jobs
from jobs.execution.memory import naming_remedies
from jobs.execution.storage import naming_places
from jobs.processes.environment import is_follower, is_on_another_node, ranks_to_start

if TYPE_CHECKING:
    from jobs.execution.collaborators import Collaborators


def perform(arguments: Arguments) -> None:
    """Do what the command line asks for, recipe after recipe; the first failure ends it.

    Raises:
        RecipeError: a recipe does not hold; nothing of any recipe has been done then.
        DataError: data, a model or a path that the user can put right.
        MissingEnvironmentError: something that this machine lacks.
        MemoryShortageError: a job did not fit into memory.
        CertificateError: a written format is not what its client reads.
        UploadError: a result did not reach the hub.
        RankLostError: one of the processes that share a job is gone.
        RankFailedError: one of them met an error of its own.
    """
    if is_follower():
        _follow(arguments)
        return
    if not COMMANDS[arguments.command].takes_recipes:
        _ALONE[arguments.command](arguments)
        return
    if not arguments.files:
        _evaluate_models(arguments)
        return
    action = _ACTIONS[arguments.command]
    for loaded in _load(arguments):
        with naming_remedies(loaded), naming_places(loaded):
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
    alone = loaded.parameters.evaluate_only or loaded.parameters.runs_alone
    ranks = 1 if alone else ranks_to_start(loaded.recipe)
    if ranks > 1:
        from jobs.processes.launcher import start_ranks

        option = "--json_path" if _is_json(loaded, arguments) else "--yaml_path"
        quiet = ["--quiet"] if arguments.quiet else []
        start_ranks(ranks, [str(arguments.program), *quiet, option, str(loaded.file), *loaded.overrides])
        return
    from jobs.processes.crew import open_crew
    from jobs.runner import run_job

    with open_crew() as crew:
        run_job(loaded, parts=_parts(arguments), crew=crew)


def _parts(arguments: Arguments) -> Collaborators | None:
    """What the runner works with; None, its own choice, where the command line asks for nothing else."""
    if not arguments.quiet:
        return None
    from jobs.execution.collaborators import Collaborators
    from jobs.logs import Terminal

    return Collaborators(terminal=Terminal(quiet=True))


def _is_json(loaded: LoadedRecipe, arguments: Arguments) -> bool:
    return any(file.as_json for file in arguments.files if file.path == loaded.file)


def _follow(arguments: Arguments) -> None:
    """What a process does that another one leads. Only a job is shared; of all else, rank 0 tells the user."""
    if arguments.command != "run":
        return
    try:
        recipes = _load(arguments)
    except RecipeError:  # rank 0 reads the same and says it
        _leave(ExitCode.RECIPE)
        return
    from jobs.processes.following import follow

    for number, loaded in enumerate(recipes, start=1):
        if not follow(loaded, number):
            _leave(ExitCode.FAILED)
            return


def _leave(code: ExitCode) -> None:
    """Leave a job that rank 0 has ended badly.

    On rank 0's node without an error, which would have the launcher stop rank 0 before it has said why; on another node with
    one, or the launcher there would wait for the others to succeed.
    """
    if is_on_another_node():
        raise RankFailedError("", code)


def _plan(loaded: LoadedRecipe, arguments: Arguments) -> None:
    from jobs.logs import Terminal
    from jobs.runner import plan_job

    plan = plan_job(loaded, parts=_parts(arguments), with_probe=arguments.probe)
    Terminal(quiet=arguments.quiet).show(plan.as_table(), plan.as_text())


def _evaluate(loaded: LoadedRecipe, arguments: Arguments) -> None:
    from jobs.runner import evaluate_only

    evaluate_only(loaded, arguments.directory, parts=_parts(arguments))


def _evaluate_models(arguments: Arguments) -> None:
    from jobs.scoring.standalone import Request, evaluate_models

    request = Request(
        base=arguments.base_model,
        model=arguments.quantized_model or arguments.pruned_model,
        label="quantized" if arguments.pruned_model is None else "pruned",
        tasks=arguments.tasks or "",
        results=arguments.results or Path("user_data/evals"),
        cache_dir=arguments.cache_dir,
        overrides=arguments.overrides,
    )
    evaluate_models(request, parts=_parts(arguments))


def _push(loaded: LoadedRecipe, arguments: Arguments) -> None:
    from jobs.runner import push_result

    push_result(loaded, is_dry_run=arguments.dry_run, parts=_parts(arguments))


def _validate(loaded: LoadedRecipe, arguments: Arguments) -> None:
    recipe = loaded.recipe
    lines = [f"{loaded.file}: valid; {recipe.algorithm} on {recipe.model}, job folder {recipe.job_folder}"]
    _say([*lines, *(f"  warning: {warning}" for warning in loaded.warnings)])


_ACTIONS: Mapping[str, Callable[[LoadedRecipe, Arguments], None]] = {
    "run": _run,
    "plan": _plan,
    "evaluate": _evaluate,
    "push": _push,
    "validate": _validate,
}


def _list(arguments: Arguments) -> None:
    jobs = list_jobs(arguments.user_folder)
    algorithms = [f"  {row.name:<16}{row.summary}" for row in rows()]
    listed = [line for job in jobs for line in _job_lines(job)] or ["  none"]
    _say(["algorithms", *algorithms, "", f"jobs below {arguments.user_folder}", *listed])


def _compare(arguments: Arguments) -> None:
    from jobs.logs import Terminal
    from jobs.reporting.comparison import as_tables, as_text, find_job, read_entries
    from jobs.reporting.html.compare import comparison

    entries = read_entries([find_job(name, arguments.user_folder) for name in arguments.jobs])
    assert arguments.output is not None, "it has a default"
    try:
        arguments.output.write_text(comparison(entries), encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output {arguments.output}: cannot be written ({error.strerror})") from error
    Terminal().show(as_tables(entries), as_text(entries))
    _say(["", f"page: {arguments.output}"])


def _schema(arguments: Arguments) -> None:
    from jobs.command_line.editor_schema import current_schema

    written = current_schema()
    if arguments.output is None:
        _say(written.splitlines())
        return
    try:
        arguments.output.write_text(written, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output {arguments.output}: cannot be written ({error.strerror})") from error


def _inspect(arguments: Arguments) -> None:
    from jobs.command_line.inspection import inspect

    _say(inspect(arguments.model, arguments.user_folder, trust_remote_code=arguments.trust_remote_code))


def _doctor(arguments: Arguments) -> None:
    from jobs.command_line.doctor import examine

    found = examine(Path.cwd(), os.environ)
    _say(found.lines())
    if found.problems:
        what = "\n".join(f"  {problem}" for problem in found.problems)
        raise MissingEnvironmentError(f"This machine lacks:\n{what}\nTo get it: pip install -r requirements.txt")


_ALONE: Mapping[str, Callable[[Arguments], None]] = {
    "compare": _compare,
    "ls": _list,
    "inspect": _inspect,
    "doctor": _doctor,
    "schema": _schema,
}


def _job_lines(job: JobEntry) -> list[str]:
    stages = ", ".join(f"{stage} {status}" for stage, status in job.stages.items())
    return [f"  {job.name}  {job.algorithm}  {job.status}", *([f"      {stages}"] if stages else [])]


def _say(lines: list[str]) -> None:
    """Write a command's answer. Jobs talk through jobs.logs, which imports torch; these answers should not wait for it."""
    sys.stdout.write(visible("\n".join(lines) + "\n"))
