"""Every key of a recipe with the value that holds, and whether the recipe says so or leaves it to the default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from configs.loader import BLOCK, LoadedRecipe


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key, with dots between blocks, and its value."""

    key: str
    value: object
    is_default: bool


def settings_of(loaded: LoadedRecipe) -> list[Setting]:
    """The keys of the envelope and of the algorithm's block; those of the recipe that they do not have, as it spells them."""
    given = dict(_flat(loaded.resolved))
    prefix = f"{BLOCK}.{loaded.recipe.algorithm}"
    known = {
        **dict(_flat(loaded.recipe.model_dump(mode="json", by_alias=True))),
        **dict(_flat(loaded.parameters.model_dump(mode="json", by_alias=True), prefix)),
    }
    rows = [Setting(key=key, value=value, is_default=not _is_given(key, given)) for key, value in known.items()]
    covered = [key for key in given if any(_covers(key, other) for other in known)]
    return rows + [Setting(key=key, value=value, is_default=False) for key, value in given.items() if key not in covered]


def _is_given(key: str, given: Mapping[str, object]) -> bool:
    return any(_covers(key, other) for other in given)


def _covers(one: str, other: str) -> bool:
    """Whether two keys are the same, or one is a block that holds the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, key)
        else:
            yield key, value
