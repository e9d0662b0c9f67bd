"""Checks that the keys of several tunings have in common. Imports no torch."""

from __future__ import annotations

from pydantic import ValidationInfo

from configs.values import expected


def divides_a_batch(value: int | None, info: ValidationInfo) -> int | None:
    """Micro-batches of ``value`` sequences, null for one, fill a batch of ``batch_size``."""
    batch_size = info.data.get("batch_size")
    if value is not None and batch_size is not None and batch_size % value:
        raise expected(f"a divisor of batch_size, which is {batch_size}")
    return value


def has_held_out(value: bool, info: ValidationInfo) -> bool:
    """The best state can be kept only where sequences are held out to judge by."""
    if value and info.data.get("validation_size") == 0:
        raise expected("false, since val_size is 0: the best state is that of the lowest divergence on held-out sequences")
    return value
