"""The small files of a model folder that travel with its weights unchanged: tokenizer, generation settings, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

_NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)


def copy_companions(origin: Path, destination: Path) -> tuple[str, ...]:
    """Copy the companion files that ``origin`` has into ``destination``; returns their names."""
    found = tuple(name for name in _NAMES if (origin / name).is_file())
    for name in found:
        shutil.copyfile(origin / name, destination / name)
    return found
