"""Running out of memory, in its several forms, as one error that names the overrides that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import DataError, MemoryShortageError, RankFailedError, RankLostError
from configs.loader import BLOCK, LoadedRecipe

OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "can't start new thread",  # no room for its stack
    "failed to map segment",  # of a library that is loaded late
)


@contextmanager
def naming_remedies(loaded: LoadedRecipe) -> Iterator[None]:
    """Turn the several ways of running out of memory into one error that names the overrides that help.

    Raises:
        MemoryShortageError: the block did not fit into memory.
    """
    try:
        yield
    except (MemoryShortageError, RankFailedError, RankLostError):
        raise  # said already, by whoever ran out of it
    except (MemoryError, RuntimeError, OSError, ImportError, DataError) as error:
        if not any(map(_is_memory_shortage, causes(error))):
            raise
        raise MemoryShortageError(_remedies(loaded, error)) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was made from, the newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_memory_shortage(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory. Torch's CPU allocator raises a plain RuntimeError, told by its words."""
    kind = type(error)
    by_type = isinstance(error, MemoryError) or (kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"))
    return by_type or any(words in str(error).lower() for words in OUT_OF_MEMORY_WORDS)


def _remedies(loaded: LoadedRecipe, error: BaseException) -> str:
    lines = [f"{loaded.file}: the job ran out of memory ({' '.join(str(error).split())[:200] or type(error).__name__})."]
    overrides = overrides_that_help(loaded)
    if overrides:
        lines.append("What is finished is kept. Run the same command again with one of these, the first that you can:")
        lines.extend(f"  {override}" for override in overrides)
    else:
        lines.append("What is finished is kept. Run the same command again on a machine with more memory.")
    return "\n".join(lines)


def overrides_that_help(loaded: LoadedRecipe) -> tuple[str, ...]:
    """What to write on the command line so that the job needs less memory, the gentlest first."""
    return tuple(f"{BLOCK}.{loaded.recipe.algorithm}.{override}" for override in loaded.parameters.memory_remedies())
