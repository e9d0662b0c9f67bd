"""A coder of each kind for small matrices."""

from __future__ import annotations

from collections.abc import Callable

from algorithms.numerics.residuals.aqlm import AdditiveCoder
from algorithms.numerics.residuals.coder import ResidualCoder
from algorithms.numerics.residuals.nf import NormalFloatCoder
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings

CODERS: dict[str, Callable[[], ResidualCoder]] = {
    "vq": lambda: VectorCoder(VectorSettings(code_bits=4, bucket=2)),
    "vq of three": lambda: VectorCoder(VectorSettings(code_bits=6, bucket=3)),
    "vq of ten bits": lambda: VectorCoder(VectorSettings(code_bits=10, bucket=2)),
    "vq permuted": lambda: VectorCoder(VectorSettings(code_bits=4, bucket=2, permutes=True)),
    "nf2": lambda: NormalFloatCoder(2),
    "nf3": lambda: NormalFloatCoder(3),
    "aqlm": lambda: AdditiveCoder(6, 4),
    "aqlm of two books": lambda: AdditiveCoder(10, 4),
}
