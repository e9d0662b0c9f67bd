"""The parameters of rounding to nearest as recipes spell them (``llm.RTN``), with their ranges and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from algorithms.blockwise.config import BlockwiseParameters, columns_a_group
from configs.values import Flag, Whole


class RtnConfig(BlockwiseParameters):
    """The block ``llm.RTN``. The keys about text and targets count with ``block_tuning`` alone: rounding needs no data.

    Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`.
    """

    algorithm: ClassVar[str] = "RTN"
    export_formats: ClassVar[tuple[str, ...]] = ("compressed-tensors", "gptq", "auto-round", "gguf", "dense")

    bits: Annotated[int, BeforeValidator(Whole(2, 8))] = Field(default=4, alias="wbits")
    group_size: Annotated[int, BeforeValidator(columns_a_group)] = Field(default=128, alias="groupsize")
    symmetric: Flag = Field(default=True, alias="sym")
    range_search: Flag = Field(default=True, alias="mse")

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes a calibration: without block tuning, those of the grid alone."""
        settings = super().shaping
        if self.block_tuning is not None:
            return settings
        return {name: settings[name] for name in ("bits", "group_size", "symmetric", "range_search")}
