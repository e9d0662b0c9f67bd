"""The safetensors files of a model folder, as somebody else wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from algorithms.modeling.families.stored_names import StoredTensor


class ModelError(ValueError):
    """A model folder that cannot be used as it is; the message says what is wrong with which file."""


def opened(file: Path) -> safe_open:
    """A weight file, whose head tells its own size.

    Raises:
        ModelError: it is truncated or no safetensors.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"MODEL: {file} is truncated or damaged ({error}). Fetch the model again.") from error


def weight_map(index: Path) -> Mapping[str, str]:
    """Tensor name -> file, of an index that somebody else wrote.

    Raises:
        ModelError: it is no index, or names files outside its folder.
    """
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        outside = [name for name in files.values() if PurePath(name).is_absolute() or ".." in PurePath(name).parts]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"MODEL: {index} is damaged ({type(error).__name__}: {error}). Fetch the model again.") from error
    if outside:
        raise ModelError(f"MODEL: {index} names {outside[0]!r}, which is no file of its folder. Do not use this model.")
    return files


def read_tensor(handle: safe_open, stored: StoredTensor) -> Tensor:
    """A parameter from an open file; of a tensor of all experts, what is one expert's."""
    if stored.expert is None:
        return handle.get_tensor(stored.name)
    first, last = stored.rows
    return handle.get_slice(stored.name)[stored.expert, first:last]
