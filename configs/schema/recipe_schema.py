"""The schema of a whole recipe: its envelope, and below ``llm`` one block for each algorithm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.compatibility import IGNORED, REFUSED, SPELLINGS
from configs.compatibility import UNSET as UNSET_VALUES
from configs.recipe import Recipe
from configs.schema.descriptions import DESCRIPTIONS
from configs.schema.readers import DEFINITIONS, NULL, REFERENCE, Schema, any_of, expectation, inner_block, of_field
from configs.strict import AlgorithmParameters, Parameters

DRAFT = "https://json-schema.org/draft/2020-12/schema"
BLOCK = "llm"
LINE = 160


@dataclass(frozen=True, kw_only=True)
class AlgorithmBlock:
    """An algorithm as recipes name it: its name, its further names, and the class of its parameters."""

    name: str
    aliases: tuple[str, ...]
    config: type[AlgorithmParameters]

    @property
    def names(self) -> tuple[str, ...]:
        """All of its names."""
        return (self.name, *self.aliases)


def recipe_schema(algorithms: Sequence[AlgorithmBlock]) -> Schema:
    """The JSON schema of recipes.

    Args:
        algorithms: every algorithm.
    """
    blocks = _Blocks()
    properties = _properties(Recipe, blocks)
    names = [name for algorithm in algorithms for name in algorithm.names]
    properties["ALGORITHM"] = {"description": properties["ALGORITHM"]["description"], **any_of({"enum": names}, REFERENCE)}
    properties[BLOCK] = _any_parameters(names)
    properties |= {key: {"description": f"No effect: {reason}"} for key, reason in IGNORED.items()}
    properties |= {key: {"description": reason, "enum": list(UNSET_VALUES)} for key, reason in REFUSED.items()}
    properties |= {spelling: properties[key] for spelling, key in SPELLINGS.items()}
    chosen = [_parameters_of(algorithm, blocks) for algorithm in algorithms]
    return {
        "$schema": DRAFT,
        "title": "Recipe",
        "type": "object",
        "properties": properties,
        "required": [field.alias or name for name, field in Recipe.model_fields.items() if field.is_required()],
        "additionalProperties": False,
        "allOf": chosen,
        "$defs": {**DEFINITIONS, **dict(sorted(blocks.found.items()))},
    }


def schema_text(schema: Schema) -> str:
    """A schema as its file holds it: what fits into a line stands in one."""
    return _written(schema, "") + "\n"


def _written(value: object, indent: str) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= LINE:
        return line
    deeper = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + _written(inner, deeper) for inner in value) + f"\n{indent}]"
    pairs = (f"{deeper}{json.dumps(key, ensure_ascii=False)}: {_written(inner, deeper)}" for key, inner in value.items())
    return "{\n" + ",\n".join(pairs) + f"\n{indent}}}"


@dataclass
class _Blocks:
    """The blocks that were met so far, by the names that they have in ``$defs``."""

    found: dict[str, Schema] = field(default_factory=dict)

    def reference(self, block: type[BaseModel]) -> str:
        """Where the schema of a block stands; made when it is first asked for."""
        name = ".".join((block.__module__.split(".")[-2], block.__name__))
        if name not in self.found:
            self.found[name] = {}  # taken, should the block hold one of its kind
            self.found[name] = {
                "type": "object",
                "description": _summary(block),
                "properties": _properties(block, self),
                **({"patternProperties": dotted} if (dotted := self.dotted(block)) else {}),
                "additionalProperties": False,
            }
        return f"#/$defs/{name}"

    def dotted(self, block: type[BaseModel]) -> dict[str, Schema]:
        """Keys with dots: a pattern for each key of the blocks inside ``block``, however deep they are."""
        return {f"^{re.escape(key)}$": {"$ref": place} for key, place in self._below(block) if "." in key}

    def _below(self, block: type[BaseModel]) -> Iterator[tuple[str, str]]:
        for name, found in block.model_fields.items():
            key, inner = found.alias or name, inner_block(found.annotation)
            yield key, f"{self.reference(block)}/properties/{key}"
            for rest, place in () if inner is None else self._below(inner):
                yield f"{key}.{rest}", place


def _properties(block: type[BaseModel], blocks: _Blocks) -> dict[str, Schema]:
    properties = {found.alias or name: _property(block, name, found, blocks) for name, found in block.model_fields.items()}
    spellings = block.spellings if issubclass(block, Parameters) else {}
    return {**properties, **{other: properties[key] for other, key in spellings.items()}}


def _property(block: type[BaseModel], name: str, found: FieldInfo, blocks: _Blocks) -> Schema:
    """One key: what it means, its default, what it accepts."""
    inner = inner_block(found.annotation)
    if inner is not None:
        nullable = [NULL] if inner is not found.annotation else []
        return {"description": _summary(inner), **any_of({"$ref": blocks.reference(inner)}, *nullable, REFERENCE)}
    key, has_reader = found.alias or name, bool(found.metadata)
    accepts = of_field(found.annotation, found.metadata)
    if found.default is None and not has_reader and accepts:
        accepts = any_of(accepts, NULL)
    described: Schema = {"description": text} if (text := _description(block, name, key, found)) else {}
    if found.default is not PydanticUndefined:
        described["default"] = json.loads(json.dumps(found.default, default=_plain))
    return {**described, **accepts}


def _plain(value: object) -> str:
    assert isinstance(value, Path), f"a default that JSON does not have: {value!r}"
    return value.as_posix()


def _description(block: type[BaseModel], name: str, key: str, found: FieldInfo) -> str:
    inert = block.inert if issubclass(block, Parameters) else {}
    said = DESCRIPTIONS.get((block.__name__, key))
    parts = [said or expectation(found.metadata), f"no effect: {inert[name].reason}" if name in inert else None]
    text = "; ".join(part for part in parts if part)
    return text[:1].upper() + text[1:]


def _summary(block: type[BaseModel]) -> str:
    """The first line of a block's docstring, without markup."""
    first = (block.__doc__ or "").strip().partition("\n")[0]
    return first.replace("``", "")


def _any_parameters(names: Sequence[str]) -> Schema:
    listed = "|".join(map(re.escape, names))
    return {
        "description": "The parameters of the algorithm, in a block of its name",
        "type": ["object", "null"],
        "properties": {name: {} for name in names},
        "patternProperties": {rf"^({listed})\.": {}},
        "additionalProperties": False,
    }


def _parameters_of(algorithm: AlgorithmBlock, blocks: _Blocks) -> Mapping[str, object]:
    """If ALGORITHM is this one, its block, its stages and its formats count."""
    config = algorithm.config
    place = any_of({"$ref": blocks.reference(config)}, NULL, REFERENCE)
    then = {
        BLOCK: {"properties": dict.fromkeys(algorithm.names, place)},
        "EXPORT": {"items": any_of({"enum": list(config.export_formats)}, REFERENCE)},
        "STAGES": {"items": any_of({"enum": list(config.stage_names)}, REFERENCE)},
    }
    named = {"properties": {"ALGORITHM": {"enum": list(algorithm.names)}}, "required": ["ALGORITHM"]}
    return {"if": named, "then": {"properties": then}}
