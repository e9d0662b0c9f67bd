"""The command line: ``python main.py [COMMAND] --yaml_path F [F2 ...] [KEY=VALUE ...]``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.document import OVERRIDE

COMMANDS = {
    "run": "run the recipes in order, and stop at the first that fails (the default)",
    "plan": "say which stages would run, and why, without running them",
    "validate": "check the recipes",
    "evaluate": "measure the recipe's model, or the model in --directory, and nothing else",
    "ls": "list the algorithms, and the jobs below a user folder",
}
_COMMAND_FIRST = f"the command comes first, before --yaml_path. The commands are {', '.join(COMMANDS)}."


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe as the command line names it."""

    path: Path
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line asks for. ``directory`` is evaluate's, ``user_folder`` is ls's.

    ``probe`` is plan's. ``program`` is the file that was started, and that further processes of a job are started with.
    """

    command: str
    files: tuple[RecipeFile, ...] = ()
    overrides: tuple[str, ...] = ()
    directory: Path | None = None
    user_folder: Path = Path("user_data")
    program: Path = Path("main.py")
    probe: bool = False


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
            if OVERRIDE.fullmatch(value) and not Path(value).is_file():
                namespace.overrides.append(value)
            else:
                namespace.files.append(RecipeFile(path=Path(value), as_json=self.const))


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line; a line that makes no sense ends the process with a usage message and exit code 2."""
    named = bool(argv) and argv[0] in COMMANDS
    command, rest = (argv[0], argv[1:]) if named else ("run", argv)
    if command == "ls":
        parser = argparse.ArgumentParser(prog="main.py ls", description=COMMANDS["ls"], allow_abbrev=False)
        parser.add_argument("user_folder", nargs="?", type=Path, default=Path("user_data"))
        return Arguments(command=command, user_folder=parser.parse_args(rest).user_folder)
    parser = _recipe_parser(command)
    if not named and argv and not argv[0].startswith("-") and not OVERRIDE.fullmatch(argv[0]):
        parser.error(f"{argv[0]!r} is no command; {_COMMAND_FIRST}")
    found = parser.parse_intermixed_args(rest, argparse.Namespace(files=[], overrides=[]))
    late = [word for word in (*(str(file.path) for file in found.files), *found.more) if word in COMMANDS]
    if late and not Path(late[0]).exists():
        parser.error(f"{late[0]!r} stands too late; {_COMMAND_FIRST}")
    if not found.files:
        parser.error("name a recipe: --yaml_path FILE or --json_path FILE")
    return Arguments(
        command=command,
        files=tuple(found.files),
        overrides=(*found.overrides, *found.more),
        directory=found.directory if command == "evaluate" else None,
        probe=command == "plan" and found.probe,
    )


def _recipe_parser(command: str) -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<10}{meaning}" for name, meaning in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="main.py",
        usage="main.py [COMMAND] --yaml_path FILE [FILE ...] [KEY=VALUE ...]",
        description=COMMANDS[command],
        epilog=f"commands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option, as_json in (("--yaml_path", False), ("--json_path", True)):
        parser.add_argument(option, nargs="+", action=_AddFiles, const=as_json, metavar="FILE", help="recipes, in order")
    if command == "evaluate":
        parser.add_argument("--directory", type=Path, help="a Hugging Face folder, in place of the recipe's model")
    if command == "plan":
        parser.add_argument("--probe", action="store_true", help="measure what it costs, on the first blocks of the model")
    parser.add_argument(
        "more", nargs="*", metavar="KEY=VALUE", help="overrides, such as llm.AQLM.calibration_config.nsamples=256"
    )
    return parser
