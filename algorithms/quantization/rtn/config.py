"""The parameters of rounding to nearest as recipes spell them (``llm.RTN``), with their ranges and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from algorithms.blockwise.config import BlockwiseParameters, GroupSize
from configs.values import Flag, Whole

_GRID = ("bits", "group_size", "symmetric", "range_search")
_ALWAYS = (*_GRID, "save_intermediate_results", "overwrite", "block_tuning")


class RtnConfig(BlockwiseParameters):
    """The block ``llm.RTN``. The keys about text and targets count with ``block_tuning`` alone: rounding needs no data.

    Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`.
    """

    algorithm: ClassVar[str] = "RTN"
    export_formats: ClassVar[tuple[str, ...]] = ("compressed-tensors", "gptq", "auto-round", "awq", "gguf", "dense")

    bits: Annotated[int, BeforeValidator(Whole(2, 8))] = Field(default=4, alias="wbits")
    group_size: GroupSize = Field(default=128, alias="groupsize")
    symmetric: Flag = Field(default=True, alias="sym")
    range_search: Flag = Field(default=True, alias="mse")

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes a calibration: without block tuning, those of the grid alone."""
        settings = super().shaping
        if self.block_tuning is not None:
            return settings
        return {name: settings[name] for name in _GRID}

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """One line for the keys that count with block tuning alone, where there is none."""
        if self.block_tuning is not None:
            return super().warnings(prefix)
        fields = type(self).model_fields
        idle = [fields[name].alias or name for name in fields if name in self.model_fields_set and name not in _ALWAYS]
        return (f"{prefix}{', '.join(idle)} without effect: rounding uses no text without block_tuning",) if idle else ()
