"""The JSON schema of the recipes that this version reads, with every algorithm of the registry."""

from __future__ import annotations

from algorithms.registry import config_class, rows
from configs.schema.recipe_schema import AlgorithmBlock, recipe_schema, schema_text


def current_schema() -> str:
    """The schema as its file ``configs/schema/recipe.schema.json`` holds it."""
    found = [AlgorithmBlock(name=row.name, aliases=row.aliases, config=config_class(row.name)) for row in rows()]
    return schema_text(recipe_schema(found))
