"""``${}`` in recipes: ``${USER_FOLDER}/text.json``, ``${llm.AQLM.calibration_config.seed}``, ``${oc.env:HOME}``.

OmegaConf resolves them. Before it does, the references are followed and measured: one is resolved anew wherever it is
used, so a few lines could otherwise expand to gigabytes, or for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from configs.document import Document
from configs.tree import KeyPath
from configs.values import nearest_name

MAX_REFERRING = 200  # values that hold references
MAX_EXPANDED = 1_000_000  # characters of all these values with every reference written out
REFERENCE_COST = 500  # characters that one reference counts for: OmegaConf takes about 0.1 ms to follow it
REFERENCE = re.compile(r"\$\{([^${}:]+)\}")
RESOLVER = re.compile(r"\$\{([^${}:]*):[^${}]*\}")
OPENING = re.compile(r"(?<!\\)\$\{")
ENVIRONMENT = "oc.env"
MUST_BE_GIVEN = "???"  # OmegaConf's mark for a value that a recipe leaves to the command line


class _ReferenceError(ValueError):
    """What was expected of a reference, and the key that was probably meant."""

    def __init__(self, expected: str, nearest: str | None = None) -> None:
        self.expected, self.nearest = expected, nearest
        super().__init__(expected)


def interpolate(document: Document) -> dict[str, object]:
    """The document's values with every ``${}`` replaced. What cannot be replaced is noted as a problem and left as it is."""
    leaves = dict(_leaves(document.values, ()))
    for path, leaf in leaves.items():
        if leaf == MUST_BE_GIVEN:
            document.problem(path, leaf, "a value: ??? stands for one that the command line has to give as KEY=VALUE")
    referring = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, str) and "${" in leaf}
    if len(referring) > MAX_REFERRING:
        document.problem((), len(referring), f"at most {MAX_REFERRING} values with a ${{}} reference")
        return document.values
    references = _References(document.values)
    sound: dict[KeyPath, str] = {}
    unsound: set[KeyPath] = set()
    for path, leaf in referring.items():
        try:
            references.check(path, leaf)
            sound[path] = leaf
        except _ReferenceError as problem:
            document.problem(path, leaf, problem.expected, problem.nearest)
            unsound.add(path)
    if not sound:
        return document.values
    new = _resolve(document, sound, unsound)
    return {key: _replaced(value, (key,), new) for key, value in document.values.items()}


def _leaves(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    """Every single value below ``value``, with its path."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*path, key))
    else:
        yield path, value


def _replaced(value: object, path: KeyPath, new: Mapping[KeyPath, object]) -> object:
    """A copy of ``value`` with the values at the paths of ``new`` exchanged."""
    if isinstance(value, dict):
        return {key: _replaced(inner, (*path, key), new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, (*path, index), new) for index, inner in enumerate(value)]
    return new.get(path, value)


class _References:
    """Follows the references of a recipe without resolving them."""

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values
        self._sizes: dict[KeyPath, int] = {}
        self._total = 0
        self._following: set[KeyPath] = set()

    def check(self, path: KeyPath, text: str) -> None:
        """Raise the problem of the value at ``path``: its form, an unknown key, a loop, its size."""
        for name in RESOLVER.findall(text):
            if name != ENVIRONMENT:
                raise _ReferenceError(f"a reference to a key, or ${{{ENVIRONMENT}:NAME}} (there is no ${{{name}:...}})")
        if OPENING.search(RESOLVER.sub("", REFERENCE.sub("", text))):
            raise _ReferenceError("references such as ${USER_FOLDER}, each closed by } and without another inside")
        for name in REFERENCE.findall(text):
            if not name.startswith(".") and self._find(self._target(path, name)) is _ABSENT:
                known = (".".join(map(str, leaf)) for leaf, _ in _leaves(self._values, ()))
                raise _ReferenceError(f"a reference to a key of this recipe ({name} is none)", nearest_name(name, known))
        self._total += self._size(path)
        if self._total > MAX_EXPANDED:
            raise _ReferenceError(f"references that expand to at most {MAX_EXPANDED // REFERENCE_COST} others, or less text")

    def _size(self, path: KeyPath) -> int:
        """What the value at ``path`` costs once all is written out, in characters and never much more than the limit."""
        if path in self._following:
            raise _ReferenceError("references that do not lead back to themselves")
        if path not in self._sizes:
            self._following.add(path)
            try:
                self._sizes[path] = min(self._measured(path), MAX_EXPANDED + 1)
            finally:
                self._following.discard(path)
        return self._sizes[path]

    def _measured(self, path: KeyPath) -> int:
        value = self._find(path)
        if isinstance(value, dict | list):
            keys = value if isinstance(value, dict) else range(len(value))
            return 1 + sum(self._size((*path, key)) for key in keys)
        if not isinstance(value, str):
            return 1
        targets = [self._target(path, name) for name in REFERENCE.findall(value)]
        return 1 + len(value) + sum(REFERENCE_COST + self._size(target) for target in targets)

    def _target(self, path: KeyPath, name: str) -> KeyPath:
        """The path that ``name`` means in the value at ``path``; leading dots count blocks from the inside out."""
        dots = len(name) - len(name.lstrip("."))
        parts = [part for part in re.split(r"[.\[\]]+", name) if part]
        start = path[: max(len(path) - dots, 0)] if dots else ()
        return (*start, *(int(part) if part.isdecimal() else part for part in parts))

    def _find(self, path: KeyPath) -> object:
        value: object = self._values
        for part in path:
            if isinstance(value, dict) and (part in value or str(part) in value):
                value = value[part] if part in value else value[str(part)]
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return _ABSENT
        return value


_ABSENT = object()


def _resolve(document: Document, sound: Mapping[KeyPath, str], unsound: set[KeyPath]) -> dict[KeyPath, object]:
    """What OmegaConf makes of the texts at the ``sound`` paths; the ``unsound`` ones are hidden from it."""
    # imported here: most recipes have no reference, and it would double the time that a typing error takes to be reported
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    found: dict[KeyPath, object] = {}
    hidden = dict.fromkeys(unsound)
    for path, text in sound.items():  # one by one: a value that OmegaConf cannot parse would hide all the others
        try:
            OmegaConf.create({"value": text})
        except OmegaConfBaseException as error:
            _note(document, path, text, error)
            hidden[path] = None
    config = OmegaConf.create({key: _replaced(value, (key,), hidden) for key, value in document.values.items()})
    for path in [path for path in sound if path not in hidden]:
        try:
            node: Any = config
            for part in path:
                node = node[part]
            found[path] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            _note(document, path, sound[path], error)
    return found


def _note(document: Document, path: KeyPath, text: str, error: Exception) -> None:
    document.problem(path, text, f"a reference that can be followed ({str(error).splitlines()[0]})")
