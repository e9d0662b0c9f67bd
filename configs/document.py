"""A recipe's file as plain values that know where they stand, and the ``KEY=VALUE`` overrides on top of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import Absent, RecipeError, RecipeProblem, shown
from configs.tree import MAX_DEPTH, KeyPath, LimitError, Tree, TreeError, plain_value, read_tree, unfold, unfolded

MAX_BYTES = 1_000_000
COMMAND_LINE = "command line"
OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*)=(?P<value>.*)", re.DOTALL)
TEMPLATES = ("FORMAT_STRING",)  # "{question}" is a template here, and not the YAML block that it looks like
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\t', re.DOTALL)


@dataclass
class Document:
    """A recipe as written: merged values, the line of each key, the overrides as typed, and what is wrong so far."""

    file: str
    values: dict[str, object]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    typed: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[RecipeProblem] = field(default_factory=list)

    def problem(self, path: KeyPath, value: object, expected: str, nearest: str | None = None) -> None:
        """Note what is wrong with the value at ``path``, unless something already is."""
        key = ".".join(str(part) for part in path)
        if all(known.key != key for known in self.problems):
            file, line = self._place(path)
            value = self.typed.get(path, value)
            self.problems.append(RecipeProblem(file=file, line=line, key=key, value=value, expected=expected, nearest=nearest))

    def _place(self, path: KeyPath) -> tuple[str, int | None]:
        """Where ``path`` was written: itself, something in it, or the nearest block around it."""
        if path and path not in self.lines and any(typed[: len(path)] == path for typed in self.typed):
            return COMMAND_LINE, None
        for length in range(len(path), 0, -1):
            if path[:length] in self.typed:
                return COMMAND_LINE, None
            if path[:length] in self.lines:
                return self.file, self.lines[path[:length]]
        return self.file, self.lines.get(())

    def override(self, text: str) -> None:
        """Apply one ``KEY=VALUE``; what is wrong with it becomes a problem."""
        match = OVERRIDE.fullmatch(text)
        if match is None:
            self._reject(text, "KEY=VALUE, such as llm.AQLM.calibration_config.nsamples=256")
            return
        keys = match["key"].split(".")
        path: KeyPath = tuple(keys)
        if len(path) > MAX_DEPTH:
            self._reject(text, f"at most {MAX_DEPTH} blocks inside each other")
            return
        block = self.values
        for part in keys[:-1]:
            inner = block.get(part)
            if inner is None:
                inner = block[part] = {}
            if not isinstance(inner, dict):
                self._reject(text, f"a key inside a block; {part} is a single value in the recipe")
                return
            block = inner
        block[keys[-1]] = _override_value(match["value"], template=keys[-1] in TEMPLATES)
        self.lines = {known: line for known, line in self.lines.items() if known[: len(path)] != path}
        self.typed = {known: typed for known, typed in self.typed.items() if known[: len(path)] != path}
        self.typed[path] = match["value"]

    def unfold(self, key: str) -> None:
        """Read keys with dots below ``key`` as blocks inside each other; what is said twice, differently, becomes a problem."""
        block = self.values.get(key)
        if not isinstance(block, dict):
            return
        nested, clashes = unfold(block)
        self.values[key] = nested
        written, self.lines = self.lines, {}
        for path, line in written.items():
            place = unfolded(path) if path[:1] == (key,) else path
            for length in range(len(place) + 1):
                self.lines.setdefault(place[:length], line)
        for path, typed in clashes:
            line, value = written.get((key, *typed)), _at(block, typed)
            first = f"line {self.lines[(key, *path)]}" if (key, *path) in self.lines else "another place"
            expected = f"what the same key is in {first}: {shown(_at(nested, path))}"
            name = ".".join(str(part) for part in (key, *typed))
            self.problems.append(RecipeProblem(file=self.file, line=line, key=name, value=value, expected=expected))

    def rename(self, spelling: str, key: str) -> None:
        """Let a key at the top stand where another spelling of it does; values stay as they are."""
        self.lines = {((key, *path[1:]) if path[:1] == (spelling,) else path): line for path, line in self.lines.items()}
        self.typed = {((key, *path[1:]) if path[:1] == (spelling,) else path): text for path, text in self.typed.items()}

    def _reject(self, text: str, expected: str) -> None:
        self.problems.append(RecipeProblem(file=COMMAND_LINE, line=None, key=text, value=Absent, expected=expected))


def _at(block: object, path: KeyPath) -> object:
    for part in path:
        assert isinstance(block, dict)
        block = block[part]
    return block


def _override_value(text: str, *, template: bool) -> object:
    """What ``VALUE`` means: a list or a block where it is one, otherwise a single value."""
    if text[:1] not in ("[", "{", '"', "'"):
        return plain_value(text.strip()) if text.strip() else None
    try:
        value = read_tree(text).root
    except TreeError:
        return text
    return text if template and isinstance(value, dict) else value


def read_document(path: Path, overrides: Sequence[str] = (), *, as_json: bool = False, dotted: str | None = None) -> Document:
    """Read a recipe, YAML or (by its suffix, or because ``as_json`` says so) JSON, and apply the overrides in order.

    Keys with dots below the block ``dotted`` stand for blocks inside each other, as they do in overrides.

    Raises:
        RecipeError: the file cannot be read at all. What can be passed over for now is in ``Document.problems``.
    """
    text = _read_text(path)
    try:
        tree = _read_json(text) if as_json or path.suffix.lower() == ".json" else read_tree(text)
    except TreeError as error:
        raise _unreadable(path, error.expected, error.line) from error
    if tree.root is None:
        raise _unreadable(path, "a recipe: keys such as MODEL, ALGORITHM and JOB_ID (the file is empty)")
    if not isinstance(tree.root, dict):
        raise _unreadable(path, "a block of keys such as MODEL, ALGORITHM and JOB_ID at the top", 1)
    document = Document(file=str(path), values=tree.root, lines=tree.lines)
    for key, line in tree.duplicates:
        name = ".".join(str(part) for part in key)
        expected = f"each key once (it stands in line {tree.lines[key]} already)"
        document.problems.append(RecipeProblem(file=str(path), line=line, key=name, value=Absent, expected=expected))
    if dotted is not None:
        document.unfold(dotted)
    for text in overrides:
        document.override(text)
    return document


def _unreadable(path: Path, expected: str, line: int | None = None) -> RecipeError:
    return RecipeError([RecipeProblem(file=str(path), line=line, key="", value=Absent, expected=expected)])


def _read_text(path: Path) -> str:
    try:
        if not path.is_file():
            raise _unreadable(path, "a recipe file (there is a folder)" if path.is_dir() else "a recipe file (there is none)")
        if path.stat().st_size > MAX_BYTES:
            raise _unreadable(path, f"a file of at most {MAX_BYTES} bytes: a recipe has a few thousand")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"text in UTF-8 (byte {error.start} is not)") from error
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise _unreadable(path, f"a file that can be read ({reason})") from error


def _read_json(text: str) -> Tree:
    """The values of a JSON text, with the lines that reading it as YAML finds: JSON is YAML but for tabs and some escapes."""
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise TreeError(f"valid JSON ({error.msg})", error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise TreeError(f"plain JSON ({error})") from error
    try:
        tree = read_tree(JSON_TOKEN.sub(lambda match: " " if match[0] == "\t" else match[0], text))
    except LimitError:
        raise
    except TreeError:
        return Tree(root=values)
    return Tree(root=values, lines=tree.lines, duplicates=tree.duplicates)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
