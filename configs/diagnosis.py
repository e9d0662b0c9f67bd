"""What pydantic found, as problems of the recipe: key paths in the recipe's spelling, expectations, nearest valid keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from configs.document import Document
from configs.errors import Absent
from configs.tree import KeyPath
from configs.values import nearest_name

BLOCK_ERRORS = ("model_type", "model_attributes_type", "dict_type")


def note_problems(
    document: Document, error: ValidationError, model: type[BaseModel], prefix: KeyPath, elsewhere: Mapping[str, KeyPath]
) -> None:
    """Add every finding of ``error`` to the document's problems.

    Args:
        document: the recipe, which knows where each key stands.
        error: what validating the block at ``prefix`` found.
        model: the class of that block.
        prefix: the path of the block.
        elsewhere: valid keys of the whole recipe -> their paths, for keys that stand in the wrong block.
    """
    for finding in error.errors(include_url=False):
        path, block = _spelled(model, finding["loc"])
        if finding["type"] == "extra_forbidden":
            path = (*path[:-1], finding["loc"][-1])  # as typed: it may be the Python name of a key, which is no key
        value = finding["input"]
        if finding["type"] == "expected" and finding["ctx"]["below"]:
            path, value = (*path, *finding["ctx"]["below"]), finding["ctx"]["value"]
        if isinstance(value, str) and "${" in value and document.problems:
            continue  # a reference that could not be followed: reported as that
        expected, nearest = _expectation(finding, path, block, (*prefix, *path), elsewhere)
        document.problem((*prefix, *path), Absent if finding["type"] == "missing" else value, expected, nearest)


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys of a block as recipes spell them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def all_keys(model: type[BaseModel], prefix: KeyPath) -> Iterator[KeyPath]:
    """The paths of every key in a block and in the blocks inside it."""
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        yield path
        inner = _inner_model(field.annotation)
        if inner is not None:
            yield from all_keys(inner, path)


def spellings(model: type[BaseModel]) -> dict[str, str]:
    """Python name -> key, for the keys of a block and the blocks inside it, where one name has one key."""
    keys: dict[str, set[str]] = {}
    for block in _blocks(model):
        for name, field in block.model_fields.items():
            keys.setdefault(name, set()).add(field.alias or name)
    return {name: found.pop() for name, found in keys.items() if len(found) == 1}


def _blocks(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        inner = _inner_model(field.annotation)
        if inner is not None:
            yield from _blocks(inner)


def _inner_model(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - the typing module's own words
    """The block class in ``Block`` or ``Block | None``."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _spelled(model: type[BaseModel], location: KeyPath) -> tuple[KeyPath, type[BaseModel] | None]:
    """A location in the recipe's spelling, and the class of the block that holds it."""
    path: list[str | int] = []
    block: type[BaseModel] | None = model
    holder = block
    for part in location:
        holder = block
        fields = {} if block is None else block.model_fields
        keys = {name: field.alias or name for name, field in fields.items()}
        names = {key: name for name, key in keys.items()}
        name = names.get(str(part), str(part))  # defaults are reported by their Python names
        path.append(keys.get(name, part))
        block = _inner_model(fields[name].annotation) if name in fields else None
    return tuple(path), holder


def _expectation(
    finding: Mapping[str, Any], path: KeyPath, block: type[BaseModel] | None, full: KeyPath, elsewhere: Mapping[str, KeyPath]
) -> tuple[str, str | None]:
    """What was expected in place of a finding, and the nearest valid spelling."""
    kind = finding["type"]
    if kind == "expected":
        return finding["ctx"]["expected"], finding["ctx"]["nearest"]
    if kind == "extra_forbidden":
        where = ".".join(str(part) for part in full[:-1]) or "the recipe"
        return f"a key of {where}", _nearest_key(str(path[-1]), block, elsewhere)
    if kind == "missing":
        return "this key: it has no default", None
    if kind in BLOCK_ERRORS:
        return "a block of keys (without the block, its defaults hold)", None
    return finding["msg"][:1].lower() + finding["msg"][1:], None


def _nearest_key(key: str, block: type[BaseModel] | None, elsewhere: Mapping[str, KeyPath]) -> str | None:
    """A key of the same block, or the path of one in another block; the same letters count before similar ones."""
    here = nearest_name(key, [] if block is None else keys_of(block))
    there = nearest_name(key, elsewhere)
    if there is None or (here is not None and (here.casefold() == key.casefold() or there != key.casefold())):
        return here
    return ".".join(str(part) for part in elsewhere[there])
