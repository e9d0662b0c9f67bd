"""``quant_type``: recipes of the project whose block is the default of another recipe, key by key.

Each is a file of ``configs/presets/lmquant`` that also runs by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import configs
from configs.document import read_document
from configs.tree import KeyPath

NOTHING = "llm"  # LMQuant's own defaults, which are those of the keys
PRESETS = ("gchn", "gchn_kv8", "g128", "sq_dynamic", "sq_static", "awq", "gptq", "w4a8kv4_sym")
ALIASES = {"default": NOTHING, "gchn_nyuntam": "gchn_kv8"}
NAMES = (*ALIASES, NOTHING, *PRESETS)
FOLDER = Path(configs.__file__).parent / "presets" / "lmquant"


@cache
def preset(name: str) -> Mapping[str, object]:
    """The block of a preset, as its file spells it; not to be changed. Names without a file have an empty one."""
    if name not in PRESETS:
        return {}
    blocks = read_document(FOLDER / f"{name}.yaml").values["llm"]
    assert isinstance(blocks, dict)
    return blocks["LMQuant"]


def over(defaults: Mapping[str, object], values: Mapping[str, object]) -> dict[str, object]:
    """``values`` with ``defaults`` for the keys that they do not have, in blocks inside as well."""
    merged = dict(defaults)
    for key, value in values.items():
        below = defaults.get(key)
        merged[key] = over(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def leaves(values: Mapping[str, object], at: KeyPath = ()) -> Iterator[tuple[KeyPath, object]]:
    """Every value that is no block, by its path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value
