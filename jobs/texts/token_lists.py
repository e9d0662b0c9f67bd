"""Lists of token tensors (``.pt``, ``.pth``): text that somebody has tokenised already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises for a file that holds more than tensors; nothing is unpickled here

import torch
from torch import Tensor

from algorithms.base import TokenRequest
from configs.errors import DataError
from jobs.texts.windows import Selection


def read_token_list(paths: tuple[Path, ...], origin: str) -> list[Tensor]:
    """Every sequence of the files, ``[1, length]`` int64, in file order.

    Accepted are a list of tensors ``[1, length]`` or ``[length]``, or one tensor ``[count, length]``.

    Raises:
        DataError: The file holds something else, or is damaged.
    """
    found: list[Tensor] = []
    for path in paths:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{origin}: {path} is not a list of token tensors that can be read safely ({reason}).") from error
        if isinstance(loaded, Tensor) and loaded.ndim == 2:
            loaded = list(loaded)
        if not isinstance(loaded, list | tuple) or not loaded:
            raise DataError(
                f"{origin}: {path} holds {_kind(loaded)}, not a list of token tensors [1, length] or one [count, length]."
            )
        found += [_sequence(item, index, origin) for index, item in enumerate(loaded)]
    return found


def check_vocabulary(sequences: list[Tensor], vocab_size: int, model: str, origin: str) -> None:
    """Refuses token ids that the model has no embedding for.

    Raises:
        DataError: Names the id that is furthest out and the size of the vocabulary.
    """
    largest = max(int(tokens.max()) for tokens in sequences)
    smallest = min(int(tokens.min()) for tokens in sequences)
    if largest >= vocab_size or smallest < 0:
        which = f"the largest token id is {largest}" if largest >= vocab_size else f"there is a token id {smallest}"
        raise DataError(
            f"{origin}: {which}, but the vocabulary of {model} has {vocab_size} entries (ids 0 to {vocab_size - 1}). "
            "The list belongs to another tokenizer: change DATA_PATH (or DATASET_NAME) or MODEL."
        )


def check_tokenizer(sequences: Sequence[Tensor], vocab_size: int, directory: Path) -> None:
    """Refuses what a tokenizer has made for another model than the one whose folder it stands in.

    Raises:
        DataError: Names the id that is furthest out and the size of the vocabulary.
    """
    largest = max((int(tokens.max()) for tokens in sequences if tokens.numel()), default=0)
    if largest >= vocab_size:
        raise DataError(
            f"MODEL {directory}: its tokenizer gives ids up to {largest}, but the model's vocabulary has {vocab_size} entries. "
            "The tokenizer belongs to another model: fetch MODEL again, or put its own tokenizer there."
        )


def first_sequences(sequences: list[Tensor], request: TokenRequest, origin: str) -> Selection:
    """The first N sequences, or all where no number is asked for, at their own lengths.

    Raises:
        DataError: There are fewer.
    """
    wanted = len(sequences) if request.num_samples is None else request.num_samples
    if len(sequences) < wanted:
        raise DataError(f"{origin}: the list has {len(sequences)} sequences, but nsamples={wanted}. Lower nsamples.")
    return Selection(
        sequences=tuple(sequences[:wanted]),
        places=tuple((index, 0) for index in range(wanted)),
        method="the first sequences of a token list" if request.num_samples is not None else "all sequences of a token list",
        counts={"documents": len(sequences)},
    )


def _sequence(item: object, index: int, origin: str) -> Tensor:
    if not isinstance(item, Tensor) or item.is_floating_point() or item.is_complex() or item.dtype == torch.bool:
        raise DataError(f"{origin}: entry {index} of the list is {_kind(item)}, not a tensor of token ids.")
    row = item[None] if item.ndim == 1 else item
    if row.ndim != 2 or row.shape[0] != 1 or row.shape[1] < 2:
        raise DataError(
            f"{origin}: entry {index} has the shape {list(item.shape)}; expected [1, length] or [length], length >= 2."
        )
    return row.to(torch.int64).clone()


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return "an empty list" if value in ([], ()) else f"a {type(value).__name__}"
