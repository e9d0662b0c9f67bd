"""The command line: ``python main.py [COMMAND] --yaml_path F [F2 ...] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.document import OVERRIDE


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe as the command line names it."""

    path: Path
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line asks for. Options stand in the field of their name; ``COMMANDS`` says which command has which.

    ``program`` is the file that was started, and that further processes of a job are started with.
    """

    command: str
    files: tuple[RecipeFile, ...] = ()
    overrides: tuple[str, ...] = ()
    program: Path = Path("main.py")
    quiet: bool = False
    directory: Path | None = None
    user_folder: Path = Path("user_data")
    output: Path | None = None
    jobs: Sequence[str] = ()
    model: str = ""
    trust_remote_code: bool = False
    base_model: str | None = None
    quantized_model: str | None = None
    pruned_model: str | None = None
    tasks: str | None = None
    results: Path | None = None
    cache_dir: Path | None = None
    dry_run: bool = False
    probe: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: what it does, and what adds its own options to its parser.

    With ``takes_recipes`` it is done to each of the recipes on its line, unless there is none and one of ``in_place_of_recipe``
    is given. An option's destination is a field of :class:`Arguments`.
    """

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_recipes: bool = True
    in_place_of_recipe: tuple[str, ...] = ()


class _AddFiles(argparse.Action):
    """Collects the files of --yaml_path and --json_path in the order of the command line.

    An option with several values also swallows the overrides behind it, so those are sorted out here.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        """Sort the values of one option into files and overrides."""
        for value in values if isinstance(values, list) else []:
            if OVERRIDE.fullmatch(value) and not _is_there(value):
                namespace.overrides.append(value)
            else:
                namespace.files.append(RecipeFile(path=Path(value), as_json=self.const))


def _is_there(text: str) -> bool:
    """Whether a text is the path of a file or folder; most texts cannot even be one, being too long for instance."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False


def _quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="say only warnings, errors and the result; log.log stays complete")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _quiet(parser)
    parser.add_argument("--probe", action="store_true", help="measure what it costs, on the first blocks of the model")


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _quiet(parser)
    parser.add_argument("--directory", type=Path, help="a model or a job's result, beside the recipe's model")
    models = parser.add_argument_group("without a recipe", "models are names on the hub, model folders, or folders of jobs")
    models.add_argument("--base_model", metavar="MODEL", help="the uncompressed model")
    models.add_argument("--quantized_model", metavar="MODEL", help="what has become of it")
    models.add_argument("--pruned_model", metavar="MODEL", help="the same, of a pruned model")
    models.add_argument("--tasks", metavar="LIST", help='"gsm8k:5,gptq_wikitext:0": names, and examples before a question')
    models.add_argument("--results", type=Path, metavar="FOLDER", help="where results and log go (user_data/evals)")
    models.add_argument("--cache_dir", type=Path, metavar="FOLDER", help="where data sets are kept")


def _ls_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("user_folder", nargs="?", type=Path, default=Path("user_data"))


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("jobs", nargs="+", metavar="JOB", help="a job's folder, or its JOB_ID below --user_folder")
    parser.add_argument("--user_folder", type=Path, default=Path("user_data"), metavar="FOLDER", help="(user_data)")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), metavar="FILE", help="(comparison.html)")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with a config.json, or a name on the hub")
    parser.add_argument("--user_folder", type=Path, default=Path("user_data"), metavar="FOLDER", help="(user_data)")
    parser.add_argument("--trust_remote_code", action="store_true", help="let the model run code of its own")


def _schema_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it there and not to the terminal")


def _push_options(parser: argparse.ArgumentParser) -> None:
    _quiet(parser)
    parser.add_argument("--dry-run", action="store_true", help="list what would be sent, with sizes, and send nothing")


DEFAULT = "run"
_MODELS = ("base_model", "quantized_model", "pruned_model")
COMMANDS: Mapping[str, Command] = {
    DEFAULT: Command(summary="run the recipes in order, and stop at the first that fails (the default)", add_options=_quiet),
    "plan": Command(
        summary="say which stages would run, and why, and what they would cost, without running them",
        add_options=_plan_options,
    ),
    "validate": Command(summary="check the recipes"),
    "evaluate": Command(
        summary="measure the recipe's model, the model in --directory, or --base_model and others, and nothing else",
        add_options=_evaluate_options,
        in_place_of_recipe=_MODELS,
    ),
    "push": Command(summary="upload the recipe's result to its PUSH_TO_HUB", add_options=_push_options),
    "compare": Command(
        summary="put the results of jobs side by side, in a table and by size and quality",
        add_options=_compare_options,
        takes_recipes=False,
    ),
    "ls": Command(
        summary="list the algorithms, and the jobs below a user folder", add_options=_ls_options, takes_recipes=False
    ),
    "inspect": Command(
        summary="say what of a model would be compressed and what kept, from its configuration alone",
        add_options=_inspect_options,
        takes_recipes=False,
    ),
    "doctor": Command(summary="say what this machine has, and what it lacks", takes_recipes=False),
    "schema": Command(
        summary="write the JSON schema of recipes, for editors", add_options=_schema_options, takes_recipes=False
    ),
}
_COMMAND_FIRST = f"the command comes first, before --yaml_path. The commands are {', '.join(COMMANDS)}."


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; a line that makes no sense ends the process with a usage message and exit code 2."""
    named = bool(argv) and argv[0] in COMMANDS
    name, rest = (argv[0], argv[1:]) if named else (DEFAULT, argv)
    command = COMMANDS[name]
    if not command.takes_recipes:
        parser = argparse.ArgumentParser(prog=f"main.py {name}", description=command.summary, allow_abbrev=False)
        command.add_options(parser)
        return Arguments(command=name, **vars(parser.parse_args(rest)))
    parser = _recipe_parser(command)
    if not named and argv and not argv[0].startswith("-") and not OVERRIDE.fullmatch(argv[0]):
        parser.error(f"{argv[0]!r} is no command; {_COMMAND_FIRST}")
    found = vars(parser.parse_intermixed_args(rest, argparse.Namespace(files=[], overrides=[])))
    files, overrides, more = found.pop("files"), found.pop("overrides"), found.pop("more")
    late = [word for word in (*(str(file.path) for file in files), *more) if word in COMMANDS]
    if late and not _is_there(late[0]):
        parser.error(f"{late[0]!r} stands too late; {_COMMAND_FIRST}")
    models = [option for option in command.in_place_of_recipe if found.get(option) is not None]
    if not files and not models:
        others = "".join(f" or --{option}" for option in command.in_place_of_recipe)
        parser.error(f"name a recipe: --yaml_path FILE or --json_path FILE{others}")
    if name == "evaluate":
        _check_models(parser, found, files, models)
    options = {option: value for option, value in found.items() if option not in _RECIPE_OPTIONS}
    return Arguments(command=name, files=tuple(files), overrides=(*overrides, *more), **options)


def _check_models(
    parser: argparse.ArgumentParser, found: Mapping[str, object], files: Sequence[object], models: Sequence[str]
) -> None:
    """Options that evaluate takes with a recipe, and those that it takes without one."""
    alone = [option for option in (*_MODELS, "tasks", "results", "cache_dir") if found[option] is not None]
    if files and alone:
        parser.error(f"--{alone[0]} goes without a recipe; with one, write --directory FOLDER and EVALUATION.tasks=LIST")
    if models and found["directory"] is not None:
        parser.error("--directory goes with a recipe; without one, it is --quantized_model")
    if len({"quantized_model", "pruned_model"} & set(models)) > 1:
        parser.error("name one compressed model: --quantized_model or --pruned_model")


_RECIPE_OPTIONS = ("yaml_path", "json_path")  # their values are in ``files`` and ``overrides``


def _recipe_parser(command: Command) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<10}{known.summary}" for name, known in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="main.py [COMMAND] --yaml_path FILE [FILE ...] [KEY=VALUE ...]",
        description=command.summary,
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option, as_json in (("--yaml_path", False), ("--json_path", True)):
        parser.add_argument(option, nargs="+", action=_AddFiles, const=as_json, metavar="FILE", help="recipes, in order")
    command.add_options(parser)
    parser.add_argument(
        "more", nargs="*", metavar="KEY=VALUE", help="overrides, such as llm.AQLM.calibration_config.nsamples=256"
    )
    return parser
