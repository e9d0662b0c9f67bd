"""YAML text -> plain values and the line of every key.

Built from the parser's events rather than from its nodes, so that nesting, aliases and duplicates are bounded while the
text is read: a hostile file costs no more than an honest one. Keys are always text; tags and second documents are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import yaml

KeyPath = tuple[str | int, ...]

MAX_DEPTH = 32
MAX_VALUES = 20_000  # values after aliases are expanded; a recipe has about a hundred
MERGE = "<<"
LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

# What PyYAML reads, minus dates, base 60, octals and underscores: a JOB_ID of 007 or 2024-01-01 stays as it is written.
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULLS = ("", "~", "null", "Null", "NULL")
WHOLE_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,15}")
DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
STANDARD_TAG = "tag:yaml.org,2002:"
BLOCK_TAGS = (None, "!", f"{STANDARD_TAG}map", f"{STANDARD_TAG}seq")
SCALAR_TAGS = (None, *(f"{STANDARD_TAG}{kind}" for kind in ("null", "bool", "int", "float")))


class TreeError(ValueError):
    """Text that is no recipe: the line where it stops making sense, and what was expected there."""

    def __init__(self, expected: str, line: int | None = None) -> None:
        self.expected, self.line = expected, line
        super().__init__(expected)


_TOO_DEEP = "exceeded maximum nesting depth"


class LimitError(TreeError):
    """Text that is deeper or longer than any recipe."""


@dataclass
class Tree:
    """The values of a text, the line (from 1) of each key and list entry, and the keys that stand there twice."""

    root: object = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    duplicates: list[tuple[KeyPath, int]] = field(default_factory=list)


@dataclass
class _Block:
    """A mapping or a list that is still being read."""

    values: dict[str, object] | list[object]
    path: KeyPath
    anchor: str | None
    size_before: int
    key: str | None = None
    key_line: int = 0
    merged: list[object] = field(default_factory=list)


class _Builder:
    """Turns the parser's events into a tree, one at a time."""

    def __init__(self) -> None:
        self.tree = Tree()
        self.size = 0
        self._open: list[_Block] = []
        self._anchors: dict[str, tuple[object, int]] = {}
        self._documents = 0
        self._handlers: dict[type, Callable[[yaml.Event, int], None]] = {
            yaml.DocumentStartEvent: self._document,
            yaml.ScalarEvent: self._scalar,
            yaml.AliasEvent: self._alias,
            yaml.MappingStartEvent: self._start,
            yaml.SequenceStartEvent: self._start,
            yaml.MappingEndEvent: self._end,
            yaml.SequenceEndEvent: self._end,
        }

    def take(self, event: yaml.Event) -> None:
        """Add one event to the tree."""
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event, event.start_mark.line + 1)

    def _document(self, event: yaml.Event, line: int) -> None:
        self._documents += 1
        if self._documents > 1:
            raise TreeError("one recipe in a file (a second document starts here)", line)

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> None:
        if self._expects_key():
            self._open[-1].key, self._open[-1].key_line = event.value, line
            self._register(event.anchor, event.value, 1)
            return
        value = _scalar_value(event, line)
        self._count(1, line)
        self._register(event.anchor, value, 1)
        self._put(value, line)

    def _alias(self, event: yaml.AliasEvent, line: int) -> None:
        if event.anchor not in self._anchors or self._expects_key():
            raise TreeError(f"an alias of something that stands before it (*{event.anchor} does not)", line)
        value, size = self._anchors[event.anchor]
        self._count(size, line)
        self._put(deepcopy(value), line)  # a copy: an override of the one must not change the other

    def _start(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent, line: int) -> None:
        if self._expects_key():
            raise TreeError("a name before the colon, not a list or a block", line)
        if event.tag not in BLOCK_TAGS:
            raise TreeError(f"plain values without tags (not {event.tag})", line)
        if len(self._open) >= MAX_DEPTH:
            raise LimitError(f"at most {MAX_DEPTH} blocks inside each other", line)
        self._count(1, line)
        path = self._next_path()
        self.tree.lines.setdefault(path, self._line_of_key() or line)
        self._open.append(_Block({} if isinstance(event, yaml.MappingStartEvent) else [], path, event.anchor, self.size - 1))

    def _end(self, event: yaml.Event, line: int) -> None:
        block = self._open.pop()
        for merged in block.merged:
            _merge(block.values, merged, line)
        self._register(block.anchor, block.values, self.size - block.size_before)
        self._put(block.values, self.tree.lines.get(block.path, line))

    def _expects_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].values, dict) and self._open[-1].key is None

    def _next_path(self) -> KeyPath:
        if not self._open:
            return ()
        block = self._open[-1]
        return (*block.path, len(block.values) if isinstance(block.values, list) else block.key or "")

    def _line_of_key(self) -> int:
        """The line of the key that is waiting for its value, 0 in a list or at the root."""
        return self._open[-1].key_line if self._open and isinstance(self._open[-1].values, dict) else 0

    def _put(self, value: object, line: int) -> None:
        if not self._open:
            self.tree.root = value
            return
        path, block = self._next_path(), self._open[-1]
        line = self._line_of_key() or line
        if isinstance(block.values, list):
            block.values.append(value)
        elif block.key == MERGE:
            block.merged.append(value)
        elif block.key in block.values:
            self.tree.duplicates.append((path, line))
        else:
            block.values[str(block.key)] = value
        self.tree.lines.setdefault(path, line)
        block.key = None

    def _register(self, anchor: str | None, value: object, size: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = (value, size)

    def _count(self, number: int, line: int) -> None:
        self.size += number
        if self.size > MAX_VALUES:
            raise LimitError(f"at most {MAX_VALUES} values, aliases written out", line)


def read_tree(text: str) -> Tree:
    """The values of a YAML text.

    Raises:
        TreeError: the text is no YAML, or YAML that no recipe needs.
    """
    builder = _Builder()
    try:
        for event in yaml.parse(text, Loader=LOADER):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise TreeError(f"printable text ({error.reason})", line) from error
    return builder.tree


def _syntax_error(error: yaml.MarkedYAMLError, text: str) -> TreeError:
    mark = error.problem_mark or error.context_mark
    if error.problem == _TOO_DEEP:  # PyYAML 6.0.4 and later stop by themselves, before the parser's events come here
        return LimitError(f"at most {MAX_DEPTH} blocks inside each other", mark.line + 1 if mark is not None else 1)
    details = ", ".join(part for part in (error.context, error.problem) if part)
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    if "\t" in line:
        details += "; indent with spaces, not with tabs"
    elif "${" in line:
        details += "; inside [ ] and { } a text with ${ needs quotes"
    return TreeError(f"valid YAML ({details})", None if mark is None else min(mark.line + 1, len(lines)))


def _scalar_value(event: yaml.ScalarEvent, line: int) -> object:
    """A scalar as null, true, false, a number or a text."""
    if event.tag in ("!", f"{STANDARD_TAG}str"):
        return event.value
    if event.tag not in SCALAR_TAGS:
        raise TreeError(f"plain values without tags (not {event.tag})", line)
    return event.value if event.tag is None and not event.implicit[0] else plain_value(event.value)


def plain_value(text: str) -> object:
    """What an unquoted text means."""
    if text in NULLS:
        return None
    if text.lower() in BOOLEANS and text in (text.lower(), text.upper(), text.capitalize()):
        return BOOLEANS[text.lower()]
    if WHOLE_NUMBER.fullmatch(text):
        return int(text)
    if HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    if len(text) < MAX_DEPTH and DECIMAL.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _merge(values: dict[str, object] | list[object], merged: object, line: int) -> None:
    """Add the keys of a ``<<`` entry that the block does not have itself."""
    for source in merged if isinstance(merged, list) else [merged]:
        if not isinstance(source, dict) or not isinstance(values, dict):
            raise TreeError("a block, or a list of blocks, behind <<", line)
        for key, value in source.items():
            values.setdefault(key, value)


def unfolded(path: KeyPath) -> KeyPath:
    """A path in which a key with dots, ``quant.wgts.dtype``, stands for blocks inside each other; lists keep what they hold."""
    parts: list[str | int] = []
    for position, part in enumerate(path):
        if isinstance(part, int):
            return (*parts, *path[position:])
        pieces = part.split(".")
        parts.extend(pieces if all(pieces) and len(parts) + len(pieces) <= MAX_DEPTH else [part])
    return tuple(parts)


def unfold(block: Mapping[str, object]) -> tuple[dict[str, object], list[tuple[KeyPath, KeyPath]]]:
    """``block`` without keys with dots, and where it says two things about one key.

    Returns:
        The nested values, in which the first of two contradicting ones stays, and for each contradiction the unfolded path and
        the path as written of the value that was left out.
    """
    values: dict[str, object] = {}
    clashes: list[tuple[KeyPath, KeyPath]] = []
    for written, leaf in _leaves(block, ()):
        path = unfolded(written)
        taken = _store(values, path, leaf)
        if taken is not None:
            clashes.append((taken, written))
    return values, clashes


def _leaves(value: Mapping[str, object], at: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _leaves(inner, (*at, key))
        else:
            yield (*at, key), {} if isinstance(inner, Mapping) else inner


def _store(values: dict[str, object], path: KeyPath, leaf: object) -> KeyPath | None:
    """Put ``leaf`` at ``path``; where something else is already, its path."""
    block = values
    for depth, part in enumerate(path[:-1], 1):
        inner = block.setdefault(str(part), {})
        if not isinstance(inner, dict):
            return path[:depth]
        block = inner
    known = block.setdefault(str(path[-1]), leaf)
    if isinstance(known, dict):
        return None if leaf == {} else path
    return None if known == leaf and isinstance(known, bool) is isinstance(leaf, bool) else path
