"""The parameters of ReALLM as recipes spell them (``llm.ReALLM``), with their ranges and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ValidationInfo, field_validator

from algorithms.blockwise.config import NOT_SHAPING, BlockwiseParameters
from algorithms.finetuning.distillation_keys import Names
from algorithms.quantization.reallm.decoder_config import NervConfig
from algorithms.quantization.reallm.tuning_config import GlobalTuningConfig, LowRankTuningConfig
from configs.values import Choice, Count, Flag, Nullable, NumberOrZero, Overwrite, Real, Whole, expected

SURVEY, CALIBRATION, BLOC, GLOBAL, CONVERSION = STAGES = (
    "survey", "calibration", "finetune_bloc", "finetune_global", "conversion",
)  # fmt: skip
RESIDUALS = ("vq", "nf", "aqlm", "nerv")
VQ, NF, AQLM, NERV = RESIDUALS
_FACTOR_BITS = (4, 5, 6, 7, 8, 16)
_MOST_CODE_BITS = 16
_MOST_VECTOR_BITS = 12  # one codebook holds all codewords of a vector
_OF_STAGES = {"block_tuning", "global_tuning", "eval_datasets", "nerv"}
_OF_SHAPES = {"rank", "num_bits", "bucket"}


def _factor_bits(value: object) -> int:
    bits = Whole(4, 16)(value)
    if bits not in _FACTOR_BITS:
        raise expected("a whole number from 4 to 8, or 16 for float16")
    return bits


class ReallmConfig(BlockwiseParameters):
    """The block ``llm.ReALLM``. Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`.

    With ``target_bits`` a survey chooses rank, bits and bucket of every matrix, and the keys of those names count no more.
    """

    algorithm: ClassVar[str] = "ReALLM"
    stage_names: ClassVar[tuple[str, ...]] = STAGES
    export_formats: ClassVar[tuple[str, ...]] = ("dense", "reallm", "peft")

    overwrite: Annotated[bool | tuple[str, ...], BeforeValidator(Overwrite(STAGES))] = False

    # W = Q + L1 L2
    rank: NumberOrZero = 64
    low_rank_bits: Annotated[int, BeforeValidator(_factor_bits)] = 8  # of an entry of L1 and L2; 16 is float16
    iterations: Count = 10

    # Q
    residual: Annotated[str, BeforeValidator(Choice(RESIDUALS))] = VQ
    num_bits: Annotated[int, BeforeValidator(Whole(1, 8))] = 2  # a weight
    bucket: Annotated[int, BeforeValidator(Whole(1, 16))] = 2  # weights that share a code
    permute: Flag = False
    nerv: NervConfig = NervConfig()

    target_bits: Annotated[float | None, BeforeValidator(Nullable(Real(above=0.0, below=16.0)))] = None

    block_tuning: LowRankTuningConfig | None = LowRankTuningConfig()
    global_tuning: GlobalTuningConfig | None = None
    eval_datasets: Names = ()  # measured after every stage

    @property
    def code_bits(self) -> int:
        """Bits that the weights of a bucket have together."""
        return self.num_bits * self.bucket

    @property
    def calibration_shaping(self) -> Mapping[str, object]:
        """Every value that shapes the calibration."""
        free = {*NOT_SHAPING, *_OF_STAGES, *(() if self.target_bits is None else _OF_SHAPES)}
        settings = {name: value for name, value in self.model_dump(mode="json").items() if name not in free}
        if self.targets == "original":
            settings.pop("true_sequential")  # implied
        else:
            settings.pop("reference_samples")  # none is followed
        if self.min_expert_tokens is None:
            settings.pop("min_expert_tokens", None)
        return settings | self.decoder_shaping

    @property
    def decoder_shaping(self) -> Mapping[str, object]:
        """Every value that shapes decoders, where there are any."""
        if self.residual != NERV:
            return {}
        free = set() if self.target_bits is None else {"bits"}
        return {"nerv": self.nerv.model_dump(mode="json", exclude=free)}

    @field_validator("bucket")
    @classmethod
    def _a_codebook_holds_all_codes(cls, value: int, info: ValidationInfo) -> int:
        residual, num_bits = info.data.get("residual"), info.data.get("num_bits")
        most = {VQ: _MOST_VECTOR_BITS, AQLM: 8 * _MOST_CODE_BITS}.get(residual or "")
        if most is not None and num_bits is not None and num_bits * value > most:
            raise expected(f"at most {most // num_bits}: num_bits times bucket is the width of a code, at most {most} bits")
        return value

    @field_validator("num_bits")
    @classmethod
    def _normal_floats_have_tables(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("residual") == NF and not 2 <= value <= 4:
            raise expected("2, 3 or 4 with residual: nf")
        return value

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect."""
        lines = list(super().warnings(prefix))
        given = self.model_fields_set
        if self.target_bits is not None:
            lines += [f"{prefix}{name} has no effect: target_bits chooses it" for name in sorted(_OF_SHAPES & given)]
        if self.permute and self.residual != VQ:
            lines.append(f"{prefix}permute has no effect: residual: {self.residual} has no order of columns")
        if "nerv" in given and self.residual != NERV:
            lines.append(f"{prefix}nerv has no effect: residual is {self.residual}")
        if self.residual in (NF, NERV) and "bucket" in given and self.target_bits is None:
            lines.append(f"{prefix}bucket has no effect: residual: {self.residual} codes weights one by one")
        if self.residual == NERV and self.nerv.bits is not None:
            if self.target_bits is not None:
                lines.append(f"{prefix}nerv.bits has no effect: target_bits chooses it")
            elif "num_bits" in given:
                lines.append(f"{prefix}num_bits has no effect: nerv.bits is given")
        return tuple(lines)
