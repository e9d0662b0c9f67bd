"""The parameters of AWQ as recipes spell them (``llm.AutoAWQ``), with their ranges and their defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from algorithms.blockwise.config import BlockwiseParameters, GroupSize
from configs.values import Choice, Flag, NumberOrZero, Only, Real, Whole, expected, flag, nearest_name

BITS = (2, 3, 4, 8)
VERSIONS = ("GEMM", "GEMV", "GEMV_FAST")
AWQ_BITS, AWQ_GROUPS = 4, (32, 64, 128)  # that AWQ's own format holds
BOTH = "both"
_SWEEP = ("damping", "refinements")


def _bits(value: object) -> int:
    found = Whole(2, 8)(value)
    if found not in BITS:
        raise expected(f"one of {', '.join(map(str, BITS))}")
    return found


def _version(value: object) -> str:
    """Reads VERSION in any case."""
    name = value.upper() if isinstance(value, str) else value
    if name not in VERSIONS:
        raise expected(f"one of {', '.join(VERSIONS)}", nearest_name(name, VERSIONS) if isinstance(name, str) else None)
    return name


def _duo_scaling(value: object) -> bool | str:
    """Reads true, false or both."""
    if isinstance(value, str) and value.casefold() == BOTH:
        return BOTH
    if isinstance(value, bool) or (isinstance(value, str) and value.casefold() in ("true", "false")):
        return flag(value)
    raise expected("true, false or both")


Bits = Annotated[int, BeforeValidator(_bits, json_schema_input_type=Literal[2, 3, 4, 8] | str)]


class AwqConfig(BlockwiseParameters):
    """The block ``llm.AutoAWQ``. Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`."""

    algorithm: ClassVar[str] = "AutoAWQ"
    export_formats: ClassVar[tuple[str, ...]] = ("awq", "compressed-tensors", "gptq", "auto-round", "gguf", "dense")

    zero_point: Flag = Field(default=True, alias="ZERO_POINT")
    bits: Bits = Field(default=4, alias="W_BIT")
    group_size: GroupSize = Field(default=128, alias="Q_GROUP_SIZE")
    awq_version: Annotated[str, BeforeValidator(_version)] = Field(default="GEMM", alias="VERSION")

    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=512, alias="model_seqlen")
    duo_scaling: Annotated[bool | str, BeforeValidator(_duo_scaling)] = BOTH
    apply_clip: Flag = True
    objective: Annotated[str, BeforeValidator(Choice(("hessian", "block_output")))] = "hessian"
    search_steps: Annotated[int, BeforeValidator(Whole(1, 1000))] = 20
    gptq: Flag = True
    damping: Annotated[float, BeforeValidator(Real(least=0.0))] = Field(default=0.01, alias="percdamp")
    refinements: NumberOrZero = 1
    modules_to_not_convert: Annotated[
        None, BeforeValidator(Only(None, "null: embeddings, norms and the head are kept, every linear of a block is converted"))
    ] = None

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes a calibration; the packing does not, nor do the sweep's keys without the sweep."""
        left_out = {"awq_version", "modules_to_not_convert", *(() if self.gptq else _SWEEP)}
        return {name: value for name, value in super().shaping.items() if name not in left_out}

    @property
    def is_awq_by_default(self) -> bool:
        """Whether AWQ's own format is written where the recipe names none."""
        return self.zero_point and self.bits == AWQ_BITS and self.group_size in AWQ_GROUPS

    def export_warnings(self, exports: Sequence[str], prefix: str = "") -> tuple[str, ...]:
        """A line for VERSION where AWQ's own format is not written."""
        is_written = "awq" in exports if exports else self.is_awq_by_default
        if is_written or "awq_version" not in self.model_fields_set:
            return ()
        return (f"{prefix}VERSION has no effect: it is a layout within the format awq, which this recipe does not export",)

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect."""
        fields = type(self).model_fields
        idle = [fields[name].alias or name for name in _SWEEP if name in self.model_fields_set]
        lines = (f"{prefix}{', '.join(idle)} without effect: gptq: false rounds to nearest",) if idle and not self.gptq else ()
        return (*super().warnings(prefix), *lines)
