"""The codings of residuals by the names that recipes have for them."""

from __future__ import annotations

from algorithms.numerics.residuals.aqlm import AdditiveResidual
from algorithms.numerics.residuals.coder import CodedResidual
from algorithms.numerics.residuals.neural.codes import NeuralCodes
from algorithms.numerics.residuals.nf import NormalFloatCodes
from algorithms.numerics.residuals.vector_codes import VectorCodes

# The place of a name is what files keep of it: new ones come last.
KINDS = ("vq", "nf", "aqlm", "nerv")
CODINGS: dict[str, type[CodedResidual]] = {
    "vq": VectorCodes,
    "nf": NormalFloatCodes,
    "aqlm": AdditiveResidual,
    "nerv": NeuralCodes,
}


def coding(kind: str) -> type[CodedResidual]:
    """The class of residuals of one kind.

    Raises:
        ValueError: this version has no such coding.
    """
    if kind not in CODINGS:
        raise ValueError(f"residual: {kind} is not in this version; there are {', '.join(CODINGS)}.")
    return CODINGS[kind]
