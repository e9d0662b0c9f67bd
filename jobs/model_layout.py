"""Whether a model's weight files hold what its config.json asks for: told from their heads, long before the last block."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from algorithms.modeling.families.stored_names import StoredTensor
from algorithms.modeling.families.weight_files import ModelError, open_weights
from algorithms.modeling.source import ModelSource
from configs.errors import DataError

logger = logging.getLogger(__name__)

_FLOATS = ("F", "BF")  # how safetensors' names of floating types begin


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What the head of a weight file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def check_layout(source: ModelSource) -> None:
    """Compare names, shapes and types of all weights with the model that config.json describes; reads no weight.

    A model that is quantized already has names that nobody here knows.

    Raises:
        DataError: a weight is missing, has another shape or is no floating number, or config.json describes no model.
    """
    try:
        blocks = source.num_blocks
        if not 1 <= blocks <= len(source.weight_files):
            raise DataError(
                f"MODEL: {source.directory / 'config.json'} speaks of {blocks} blocks, and the weight files hold "
                f"{len(source.weight_files)} tensors. Fetch the model again."
            )
        if "quantization_config" not in source.raw_config():
            _compare(source, blocks)
    except ModelError as error:
        raise DataError(str(error)) from error


def check_length(source: ModelSource, length: int, advice: str) -> None:
    """Refuse sequences of ``length`` tokens for a model that looks positions up in a table with fewer rows.

    Args:
        source: the model.
        length: of the sequences; others than such models compute any, however badly.
        advice: what to do about it, which the message begins with.

    Raises:
        DataError: the table ends before.
    """
    positions = source.config.to_dict().get("max_position_embeddings")
    if positions is None or length <= positions:
        return
    for name, module in source.skeleton().named_modules():
        rows = module.num_embeddings if isinstance(module, nn.Embedding) else None
        # OPT keeps its first two rows free.
        if rows is not None and rows != source.vocab_size and 0 <= rows - positions <= 2:
            raise DataError(f"{advice}: sequences of {length} tokens, and {source.name} has {positions} positions ({name}).")


def _compare(source: ModelSource, blocks: int) -> None:
    stored, place = dict(_heads(source)), source.directory
    for name, parameter in source.skeleton().named_parameters():
        if name not in stored and name == f"{source.architecture.head}.weight" and source.is_tied:
            continue  # it is the embeddings
        if name not in stored:
            raise DataError(f"MODEL: {place} has no tensor {name!r}; its weight files do not match its config.json.")
        found = stored[name]
        if found.shape != tuple(parameter.shape):
            raise DataError(
                f"MODEL: {name} in {place / found.file} has the shape {list(found.shape)}, and by config.json it is "
                f"{list(parameter.shape)}. Fetch the model again."
            )
        if not found.dtype.startswith(_FLOATS):
            raise DataError(f"MODEL: {name} in {place / found.file} holds {found.dtype}, not floating numbers.")
    prefix = f"{source.architecture.blocks}."
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in stored if name.startswith(prefix)}
    more = sorted(int(number) for number in numbers if number.isdecimal() and int(number) >= blocks)
    if more:
        logger.warning(
            "%s has weights of block %d, but config.json says %d blocks; the rest is left out.", place, more[0], blocks
        )


def _heads(source: ModelSource) -> Iterator[tuple[str, _Stored]]:
    """Name and head of every tensor that the model's files are said to hold.

    Raises:
        ModelError: a file does not hold what the index says.
    """
    by_file: dict[str, dict[str, StoredTensor]] = {}
    for parameter, tensor in source.places.items():
        by_file.setdefault(tensor.file, {})[parameter] = tensor
    for file, tensors in sorted(by_file.items()):
        place = source.directory / file
        with open_weights(place) as handle:
            there = set(handle.keys())
            for parameter, tensor in tensors.items():
                if tensor.name not in there:
                    raise ModelError(f"MODEL: the index says that {tensor.name} is in {place}, which has no such tensor.")
                head = handle.get_slice(tensor.name)
                first, last = tensor.rows
                shape = head.get_shape() if tensor.expert is None else (last - first, *head.get_shape()[2:])
                yield parameter, _Stored(file=file, shape=tuple(shape), dtype=head.get_dtype())
