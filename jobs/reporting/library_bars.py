"""Progress bars of libraries, switched off for a while: datasets, transformers, huggingface_hub and lm-eval all take tqdm's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

from tqdm.std import tqdm


@contextmanager
def library_bars_off() -> Iterator[None]:
    """Bars that are made in here draw nothing, whatever their makers ask for; those that are there already go on."""
    before = tqdm.__init__

    @wraps(before)
    def hidden(self: tqdm, *arguments: object, **options: object) -> None:
        """A bar that is switched off."""
        before(self, *arguments, **{**options, "disable": True})

    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = before
