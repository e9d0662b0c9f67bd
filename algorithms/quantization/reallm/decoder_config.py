"""The keys of ``nerv: {...}`` of ReALLM: the decoder that every residual gets, and its training. Imports no torch."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator, ValidationInfo, field_validator

from configs.strict import Parameters
from configs.values import Choice, Count, Nullable, OptionalCount, OptionalPositive, Positive, Real, Whole, expected

LOSSES = ("l2", "diagonal", "hessian")


_STRIDE = Whole(2, 16)


def _strides(value: object) -> tuple[int, ...]:
    given = value if isinstance(value, list | tuple) else (value,)
    if not given:
        raise expected("a list of whole numbers of at least 2")
    return tuple(_STRIDE(stride) for stride in given)


_Stride = Annotated[int, BeforeValidator(_STRIDE)]
Strides = Annotated[tuple[int, ...], BeforeValidator(_strides, json_schema_input_type=_Stride | list[_Stride])]


class NervConfig(Parameters):
    """Sizes and training of the decoders.

    With embedding_dim and embedding_bits both given, a decoder is as wide as the bits allow; otherwise it takes
    ``decoder_share`` of them and embeddings the rest.
    """

    bits: OptionalPositive = None  # a weight, all that is stored but for the low-rank part and magnitudes; null: num_bits
    strides: Strides = (2,)
    patch_size: OptionalCount = None  # null: by the matrix, at most 512
    block_size: Count = 128  # columns that share a scale
    embedding_dim: OptionalCount = None  # channels
    embedding_bits: Annotated[int | None, BeforeValidator(Nullable(Whole(1, 8)))] = None
    weight_bits: Annotated[int, BeforeValidator(Whole(2, 8))] = 4
    decoder_share: Annotated[float, BeforeValidator(Real(above=0.0, below=1.0))] = 0.02

    epochs: Count = 100
    lr: Positive = 0.01
    batch_size: Count = 4  # frames
    loss: Annotated[str, BeforeValidator(Choice(LOSSES))] = "hessian"
    encoder_width: Count = 16
    encoder_share: Annotated[float, BeforeValidator(Real(least=0.0, most=1.0))] = 0.5  # of the epochs

    @field_validator("patch_size")
    @classmethod
    def _embeddings_have_whole_sides(cls, value: int | None, info: ValidationInfo) -> int | None:
        stride = math.prod(info.data.get("strides", (1,)))
        if value is not None and value % stride:
            raise expected(f"a multiple of {stride}, the product of the strides")
        return value
