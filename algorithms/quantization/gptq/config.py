"""The parameters of GPTQ as recipes spell them (``llm.GPTQ``), with their ranges and their defaults."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from algorithms.blockwise.config import BlockwiseParameters, GroupSize
from configs.values import Flag, NumberOrZero, Real, Whole


class GptqConfig(BlockwiseParameters):
    """The block ``llm.GPTQ``. Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`."""

    algorithm: ClassVar[str] = "GPTQ"
    export_formats: ClassVar[tuple[str, ...]] = ("compressed-tensors", "gptq", "auto-round", "awq", "gguf", "dense")

    bits: Annotated[int, BeforeValidator(Whole(2, 8))] = Field(default=4, alias="wbits")
    group_size: GroupSize = Field(default=128, alias="groupsize")
    symmetric: Flag = Field(default=True, alias="sym")
    act_order: Flag = True
    static_groups: Flag = True
    damping: Annotated[float, BeforeValidator(Real(least=0.0))] = Field(default=0.01, alias="percdamp")
    range_search: Flag = Field(default=True, alias="mse")
    refinements: NumberOrZero = 1  # passes of coordinate descent after the sweep
