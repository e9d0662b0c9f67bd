"""Which tensor of which file holds each parameter of a model.

Families name tensors in their files otherwise than transformers names parameters, and some keep all experts of a block in one
tensor. Here every parameter of the model as the project sees it, with one linear for each matrix of each expert, is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from algorithms.modeling.architecture import ModelArchitecture

_ALL_GATES_AND_UPS = re.compile(r"^(.*\.experts)\.gate_up_proj$")
_ALL_DOWNS = re.compile(r"^(.*\.experts)\.down_proj$")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A parameter is the tensor ``name`` of ``file``; of a tensor of all experts, the ``rows`` (from, to) of one ``expert``."""

    name: str
    file: str
    expert: int | None = None
    rows: tuple[int, int] = (0, 0)


def stored_tensors(
    files: Mapping[str, str], architecture: ModelArchitecture, shape_of: Callable[[str], Sequence[int]]
) -> dict[str, StoredTensor]:
    """Every parameter by name.

    Args:
        files: name of a stored tensor -> its file.
        architecture: of the model.
        shape_of: the shape of a stored tensor; asked for those alone that hold several experts.
    """
    first, _, inside = architecture.blocks.partition(".")
    # The headless base model of a family is stored without the name of its part in the causal LM.
    is_bare = not any(name.startswith(f"{first}.") for name in files) and any(name.startswith(f"{inside}.") for name in files)
    found: dict[str, StoredTensor] = {}
    for stored, file in files.items():
        name = f"{first}.{stored}" if is_bare and not stored.startswith(f"{architecture.head}.") else stored
        name = parameter_name(name, architecture)
        for parameter, tensor in _split(name, StoredTensor(name=stored, file=file), architecture, shape_of):
            found[parameter] = tensor
    return found


def parameter_name(stored: str, architecture: ModelArchitecture) -> str:
    """The model's name for a tensor that files of the family name ``stored``."""
    for theirs, ours in architecture.stored_names:
        stored = stored.replace(theirs, ours)
    return stored


def stored_name(name: str, architecture: ModelArchitecture) -> str:
    """The name that files of the family have for what the model calls ``name``."""
    for theirs, ours in reversed(architecture.stored_names):
        name = name.replace(ours, theirs)
    return name


def _split(
    name: str, stored: StoredTensor, architecture: ModelArchitecture, shape_of: Callable[[str], Sequence[int]]
) -> Iterator[tuple[str, StoredTensor]]:
    """A tensor of all experts that the model has as modules, as the matrices in it; any other as it is."""
    both, down = _ALL_GATES_AND_UPS.match(name), _ALL_DOWNS.match(name)
    match = both or down
    if match is None or architecture.experts is None or not match.group(1).endswith(f".{architecture.experts}"):
        yield name, stored
        return
    count, rows, _ = shape_of(stored.name)
    parts = {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)} if both else {"down_proj": (0, rows)}
    for expert in range(count):
        for part, span in parts.items():
            tensor = StoredTensor(name=stored.name, file=stored.file, expert=expert, rows=span)
            yield f"{match.group(1)}.{expert}.{part}.weight", tensor
