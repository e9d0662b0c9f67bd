"""The parameters of SpQR as recipes spell them (``llm.SpQR``), with their ranges and their defaults.

The names are those of SpQR's command line; what they mean is in this folder's README.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from algorithms.blockwise.config import BlockwiseParameters, GroupSize
from configs.strict import Inert
from configs.values import (
    Choice,
    Count,
    Flag,
    Nullable,
    NumberOrZero,
    Only,
    OptionalText,
    Real,
    Whole,
    expected,
)

PLAIN = 16  # wbits that stand for no quantization
STATISTIC_BITS = Nullable(Whole(1, 8))
NO_FOLDERS = "null: a job keeps its own results and resumes from them"
NO_EFFECT = "SpQR's own program never reads it"


def _bits(value: object) -> int:
    bits = Whole(1)(value)
    if bits > 8 and bits != PLAIN:
        raise expected("a whole number from 1 to 8, or 16 for no quantization")
    return bits


def _threshold(value: object) -> float | None:
    if isinstance(value, str) and value.strip().casefold() in ("inf", ".inf", "infinity"):
        return None
    if value is None or (isinstance(value, float) and value == math.inf):
        return None
    return Real(above=0.0)(value)


def _round_zero(value: object) -> bool:
    """Reads true or false; SpQR's own 0, 1 and null as well."""
    if value is None or value in (0, 1):
        return bool(value)
    raise expected("true or false")


Threshold = Annotated[float | None, BeforeValidator(_threshold, json_schema_input_type=float | str | None)]
ZeroOrOne = Annotated[bool, BeforeValidator(_round_zero, json_schema_input_type=bool | Literal[0, 1] | None)]


class SpqrConfig(BlockwiseParameters):
    """The block ``llm.SpQR``. Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`."""

    algorithm: ClassVar[str] = "SpQR"
    export_formats: ClassVar[tuple[str, ...]] = ("dense", "spqr", "spqr-tiles", "compressed-tensors", "gptq")

    bits: Annotated[int, BeforeValidator(_bits)] = Field(default=4, alias="wbits")
    group_size: GroupSize = Field(default=16, alias="groupsize")
    symmetric: Flag = Field(default=False, alias="sym")
    per_channel: Flag = Field(default=True, alias="perchannel")
    round_zero: ZeroOrOne = False
    scale_bits: Annotated[int | None, BeforeValidator(STATISTIC_BITS)] = Field(
        default=3, alias="qq_scale_bits", validate_default=True
    )
    zero_bits: Annotated[int | None, BeforeValidator(STATISTIC_BITS)] = Field(
        default=3, alias="qq_zero_bits", validate_default=True
    )
    run: Count = Field(default=16, alias="qq_groupsize")
    zero_symmetric: Flag = Field(default=False, alias="qq_zero_sym")

    # outliers: by a threshold, under a limit, or as many as a number of bits pays for
    simplified_outliers: Flag = False
    outlier_threshold: Threshold = Field(default=0.35, validate_default=True)
    max_outlier_share: Annotated[float | None, BeforeValidator(Nullable(Real(least=0.0, below=1.0)))] = None
    target_bits: Annotated[float | None, BeforeValidator(Nullable(Real(above=0.0, below=16.0)))] = None

    # the sweep
    permutation_order: Annotated[str, BeforeValidator(Choice(("identity", "act_order", "spearman")))] = "act_order"
    damping: Annotated[float, BeforeValidator(Real(least=0.0))] = Field(default=0.01, alias="percdamp")
    refinements: NumberOrZero = 1  # passes of coordinate descent after the sweep
    nearest: Flag = False

    wandb: Flag = False  # tracks the job

    # accepted without effect
    skip_out_loss: Flag = False
    new_eval: Flag = False
    norm: object = None
    grid: object = None
    maxshrink: object = None
    reserved_bins: object = None
    mse: object = None
    qq_mse: object = None
    keep_last_columns: object = 0
    blocksize: object = 128
    custom_data_path: OptionalText = None

    # refused unless they ask for nothing
    load: Annotated[None, BeforeValidator(Only(None, NO_FOLDERS))] = None
    save: Annotated[None, BeforeValidator(Only(None, NO_FOLDERS))] = None

    inert: ClassVar[Mapping[str, Inert]] = {
        "skip_out_loss": Inert(False, "with targets: original a block's error costs nothing, otherwise none is measured"),
        "new_eval": Inert(False, "name the texts under EVALUATION instead (ptb_new, c4_new)"),
        "norm": Inert(None, NO_EFFECT),
        "grid": Inert(None, NO_EFFECT),
        "maxshrink": Inert(None, NO_EFFECT),
        "reserved_bins": Inert(None, NO_EFFECT),
        "mse": Inert(None, NO_EFFECT),
        "qq_mse": Inert(None, NO_EFFECT),
        "keep_last_columns": Inert(0, NO_EFFECT),
        "blocksize": Inert(128, "it only cuts the work into pieces"),
        "custom_data_path": Inert(None, "DATA_PATH at the top of the recipe counts"),
    }

    @model_validator(mode="before")
    @classmethod
    def _without_channels_statistics_are_plain(cls, values: object) -> object:
        """With ``perchannel: false``, keys that the recipe leaves out take the values that go with it."""
        if not isinstance(values, Mapping) or values.get("perchannel", values.get("per_channel")) not in (False, "false"):
            return values
        plain: dict[str, object] = {"qq_scale_bits": None, "qq_zero_bits": None}
        if not values.get("simplified_outliers"):
            plain["outlier_threshold"] = None
        return {**plain, **values}

    @field_validator("outlier_threshold", "target_bits")
    @classmethod
    def _leaving_one_out_needs_channels(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("per_channel") is False and not info.data.get("simplified_outliers"):
            raise expected(
                "null, or simplified_outliers: true: with perchannel: false nothing can be left out of a row's group"
            )
        return value

    @field_validator("scale_bits", "zero_bits")
    @classmethod
    def _two_levels_need_channels(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("per_channel") is False:
            raise expected("null: with perchannel: false all rows share one statistic, and no run of rows has two")
        return value

    @field_validator("target_bits")
    @classmethod
    def _is_within_reach(cls, value: float | None, info: ValidationInfo) -> float | None:
        known = info.data
        names = ("bits", "group_size", "scale_bits", "zero_bits", "run", "round_zero", "symmetric")
        if value is None or not set(names) <= known.keys():
            return value
        whole_rows = known["group_size"] == -1  # how long they are is not known yet: statistics come on top of the codes
        base = known["bits"] if whole_rows else bits_without_outliers(**{name: known[name] for name in names})
        if value < base:
            raise expected(f"at least {base:g}, which codes and statistics take without any outlier")
        return value

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect, those that another key overrules included."""
        lines = list(super().warnings(prefix))
        if self.target_bits is not None and "outlier_threshold" in self.model_fields_set:
            lines.append(f"{prefix}outlier_threshold has no effect: target_bits decides how many outliers there are")
        if self.max_outlier_share is not None and self.outlier_threshold is None and self.target_bits is None:
            lines.append(f"{prefix}max_outlier_share has no effect: outlier_threshold: null makes no outliers")
        return tuple(lines)

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes a calibration, apart from the text."""
        return {name: value for name, value in super().shaping.items() if name != "wandb"}

    @property
    def tracks(self) -> bool:
        """Whether SpQR's own key asks for wandb."""
        return self.wandb

    @property
    def evaluate_only(self) -> bool:
        """Whether the recipe asks for figures of the uncompressed model and nothing else."""
        return self.bits == PLAIN

    def outlier_share(self, group_size: int) -> float | None:
        """The share of weights that may be outliers, from ``target_bits`` or ``max_outlier_share``; None without a limit."""
        if self.target_bits is None:
            return self.max_outlier_share
        base = bits_without_outliers(
            bits=self.bits, group_size=group_size, run=self.run, round_zero=self.round_zero,
            scale_bits=self.scale_bits, zero_bits=self.zero_bits, symmetric=self.symmetric,
        )  # fmt: skip
        share = max(0.0, (self.target_bits - base) / OUTLIER_BITS)
        return share if self.max_outlier_share is None else min(share, self.max_outlier_share)


OUTLIER_BITS = 32  # a float16 value and a column


def bits_without_outliers(
    *,
    bits: int,
    group_size: int,
    run: int,
    round_zero: bool,
    scale_bits: int | None,
    zero_bits: int | None,
    symmetric: bool = False,
) -> float:
    """Average bits of a weight by SpQR's own count, outliers apart; permutation and row pointers are not in it."""
    scale = 16.0 if scale_bits is None else scale_bits + 32 / run
    zero = float(bits) if round_zero else 16.0
    if symmetric:
        zero = 1.0  # known beforehand; the packed form spends a bit on saying so
    elif zero_bits is not None and (not round_zero or zero_bits < bits):
        zero = zero_bits + 32 / run
    return bits + (scale + zero) / group_size
