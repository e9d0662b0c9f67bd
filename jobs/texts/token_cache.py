"""Token sequences on disk: one safetensors file and one JSON record a key, whole or absent, checked when they are read."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from algorithms.modeling.files import atomic_folder, atomic_save_tensors, atomic_write_json, file_digest
from jobs.results.artifacts import canonical_digest

logger = logging.getLogger(__name__)

TOKENS_FILE = "tokens.safetensors"
RECORD_FILE = "record.json"


@dataclass(frozen=True, kw_only=True)
class TokenSets:
    """The sequences of one request, ``[1, length]`` int64 each.

    ``record`` says what was chosen: the text, the method, for each sequence its document and its first token, the ids held
    out for validation.
    """

    train: tuple[Tensor, ...]
    validation: tuple[Tensor, ...]
    key: str
    record: Mapping[str, object]


def read_tokens(folder: Path, key: str) -> TokenSets | None:
    """The cached sequences of a key; None if there are none, or, with a warning, if the files are damaged."""
    place = folder / key
    if not place.is_dir():
        return None
    try:
        head = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
        if head["digest"] != file_digest(place / TOKENS_FILE):
            raise ValueError("the tokens are not those that were written")
        if "record_digest" in head and head["record_digest"] != canonical_digest(head["record"]):  # older entries have none
            raise ValueError("the record is not the one that was written")
        tensors = load_file(place / TOKENS_FILE)
        train, validation = (_unflatten(tensors, part) for part in ("train", "validation"))
        return TokenSets(train=train, validation=validation, key=key, record=head["record"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        logger.warning("The cached tokens in %s cannot be used (%s); tokenising again.", place, error)
        return None


def write_tokens(folder: Path, sets: TokenSets) -> None:
    """Caches sequences under their key; a damaged entry of the same key is replaced."""
    place = folder / sets.key
    with atomic_folder(place) as partial:
        tensors = _flatten(sets.train, "train") | _flatten(sets.validation, "validation")
        atomic_save_tensors(partial / TOKENS_FILE, tensors)
        digests = {"digest": file_digest(partial / TOKENS_FILE), "record_digest": canonical_digest(dict(sets.record))}
        atomic_write_json(partial / RECORD_FILE, {**digests, "record": dict(sets.record)})
        shutil.rmtree(place, ignore_errors=True)


def _flatten(sequences: Sequence[Tensor], name: str) -> dict[str, Tensor]:
    flat = torch.cat([tokens.flatten() for tokens in sequences]) if sequences else torch.zeros(0)
    lengths = torch.tensor([tokens.numel() for tokens in sequences], dtype=torch.int64)
    return {f"{name}_tokens": flat.to(torch.int32), f"{name}_lengths": lengths}


def _unflatten(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, ...]:
    flat, lengths = tensors[f"{name}_tokens"], tensors[f"{name}_lengths"].tolist()
    return tuple(tokens.to(torch.int64)[None] for tokens in flat.split(lengths)) if lengths else ()
