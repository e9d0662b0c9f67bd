"""What a reader of ``configs.values`` and its like accepts, as a JSON schema (draft 2020-12).

The loader takes more than the type that comes out of it: numbers as text, names with commas between them, "" for unset, and
``${...}`` anywhere. A reader of a plugin's own says what it takes by ``json_schema_input_type``; otherwise its type counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import singledispatch
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic_core import PydanticCustomError, PydanticUndefined

from configs.names import (
    REPOSITORY_PATTERN,
    TOKEN_PATTERN,
    custom_model,
    dataset_reference,
    devices,
    folder_name,
    hub_repository,
    model_name,
    service_name,
    token,
)
from configs.values import Choice, Nullable, Only, Overwrite, Real, Whole, flag, names, path, text

Schema = dict[str, Any]
Reader = Callable[[object], object]

REFERENCE: Schema = {"$ref": "#/$defs/reference"}
NUMBER_TEXT: Schema = {"$ref": "#/$defs/number-as-text"}
NULL: Schema = {"type": "null"}
UNSET: Schema = {"enum": [None, ""]}
FLAG: Schema = {"$ref": "#/$defs/flag"}
TEXT: Schema = {"$ref": "#/$defs/text"}
NAMES: Schema = {"$ref": "#/$defs/names"}
_SWITCH = "|".join("".join(f"[{c.upper()}{c}]" for c in word) for word in ("true", "false", "yes", "no", "on", "off"))

DEFINITIONS: Mapping[str, Schema] = {
    "reference": {"type": "string", "pattern": r"\$\{|^\?\?\?$", "description": "${KEY}, or ??? for a value to be given later"},
    "number-as-text": {
        "type": "string",
        "pattern": r"\$\{|^\?\?\?$|^\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*$",
    },
    # Editors read YAML 1.2, where yes and no are texts; recipes are YAML 1.1, where they are not.
    "flag": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": rf"\$\{{|^\?\?\?$|^({_SWITCH})$"}]},
    "text": {"type": ["string", "integer"], "pattern": r"\S"},
    "names": {"type": ["null", "string", "array"], "items": {"type": "string", "pattern": r"\S"}, "uniqueItems": True},
}


def any_of(*schemas: Schema) -> Schema:
    """What one of ``schemas`` accepts, each of them once."""
    flat = [inner for schema in schemas for inner in (schema["anyOf"] if set(schema) == {"anyOf"} else [schema])]
    distinct = [schema for place, schema in enumerate(flat) if schema not in flat[:place]]
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


@singledispatch
def accepted(reader: Reader) -> Schema | None:
    """What a reader accepts; None where only its annotation can tell."""
    return _FUNCTIONS.get(reader)


@accepted.register
def _(reader: Whole) -> Schema:
    most = {} if reader.most is None else {"maximum": reader.most}
    return any_of({"type": "integer", "minimum": reader.least, **most}, NUMBER_TEXT)


@accepted.register
def _(reader: Real) -> Schema:
    limits = {
        "minimum": reader.least,
        "maximum": reader.most,
        "exclusiveMinimum": reader.above,
        "exclusiveMaximum": reader.below,
    }
    return any_of({"type": "number", **{word: limit for word, limit in limits.items() if limit is not None}}, NUMBER_TEXT)


@accepted.register
def _(reader: Choice) -> Schema:
    prefixed = [f"{reader.prefix}{name}" for name in reader.names] if reader.prefix else []
    return any_of({"enum": [*reader.names, *prefixed]}, REFERENCE)


@accepted.register
def _(reader: Only) -> Schema:
    number = [NUMBER_TEXT] if type(reader.value) is int else []
    return any_of({"enum": [reader.value, *([""] if reader.value is None else [])]}, *number, REFERENCE)


@accepted.register
def _(reader: Nullable) -> Schema | None:
    inner = accepted(reader.inner)
    return None if inner is None else any_of(inner, UNSET if reader.unset else NULL)


@accepted.register
def _(reader: Overwrite) -> Schema:
    listed = {"type": "array", "items": any_of({"enum": list(reader.stages)}, REFERENCE), "uniqueItems": True}
    return any_of(FLAG, listed, {"type": "string", "pattern": "|".join(reader.stages) + r"|^$"})


_FUNCTIONS: Mapping[Reader, Schema] = {
    flag: FLAG,
    text: TEXT,
    path: {"type": "string", "pattern": r"\S"},
    names: NAMES,
    folder_name: any_of({"type": ["string", "integer"], "pattern": r"^[^/\\]*[^/\\\s][^/\\]*$"}, REFERENCE),
    token: {"type": ["string", "integer"], "pattern": rf"^({TOKEN_PATTERN.pattern})$"},
    service_name: any_of({"type": "string", "pattern": "^([Kk][Oo][Mm][Pp][Rr][Ee][Ss][Ss]|[Aa][Dd][Aa][Pp][Tt])$"}, REFERENCE),
    hub_repository: any_of({"type": "string", "pattern": rf"^\s*{REPOSITORY_PATTERN.pattern}\s*$"}, REFERENCE),
    model_name: TEXT,
    custom_model: {"type": "string", "pattern": r"\S"},
    dataset_reference: TEXT,
    devices: any_of(
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"\$\{|^\?\?\?$|^$|^[0-9eE.,+\s]+$"},
        {"type": "array", "items": any_of({"type": "integer", "minimum": 0}, NUMBER_TEXT), "uniqueItems": True},
        NULL,
    ),
}


def of_annotation(annotation: Any) -> Schema:  # noqa: ANN401 - the typing module's own words
    """What a plain type accepts where no reader says more."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return of_field(inner[0], inner[1:])
    if origin in (Union, UnionType):
        return any_of(*(of_annotation(one) for one in inner))
    if origin is Literal:
        return any_of({"enum": list(inner)}, REFERENCE)
    if origin in (tuple, list):
        return any_of({"type": "array", "items": of_annotation(inner[0])}, REFERENCE)
    if origin in (dict, Mapping):
        keys = {} if inner[0] is str else {"propertyNames": of_annotation(inner[0])}
        return any_of({"type": "object", "additionalProperties": of_annotation(inner[1]), **keys}, REFERENCE)
    simple = {
        bool: FLAG,
        int: any_of({"type": "integer"}, NUMBER_TEXT),
        float: any_of({"type": "number"}, NUMBER_TEXT),
        str: {"type": "string"},
        Path: {"type": "string", "pattern": r"\S"},
        NoneType: NULL,
    }
    return simple.get(annotation, {})


def of_field(annotation: Any, metadata: tuple[object, ...] | list[object]) -> Schema:  # noqa: ANN401
    """What a field accepts, by its reader, by what that says of itself, or by its type."""
    validator = _reader(metadata)
    if validator is not None and validator.json_schema_input_type is not PydanticUndefined:
        return of_annotation(validator.json_schema_input_type)
    found = None if validator is None else accepted(validator.func)
    return of_annotation(annotation) if found is None else found


def expectation(metadata: list[object]) -> str | None:
    """What the reader of a field says it expected where nothing that it accepts is given."""
    validator = _reader(metadata)
    if validator is None:
        return None
    try:
        validator.func(object())
    except PydanticCustomError as error:
        return error.message()
    return None


def inner_block(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401
    """The class in ``Block`` or ``Block | None``."""
    blocks = (one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, BaseModel))
    return next(blocks, None)


def _reader(metadata: tuple[object, ...] | list[object]) -> BeforeValidator | None:
    return next((one for one in reversed(metadata) if isinstance(one, BeforeValidator)), None)
