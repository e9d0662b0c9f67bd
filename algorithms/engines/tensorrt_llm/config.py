"""The parameters of TensorRT-LLM engines as recipes spell them (``llm.TensorRTLLM``), with their ranges and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.strict import AlgorithmParameters, Inert
from configs.values import (
    Choice,
    Count,
    Flag,
    FloatDtype,
    NumberOrZero,
    OptionalCount,
    OptionalPositive,
    OptionalText,
    Overwrite,
    Real,
    Whole,
    expected,
    path,
)

STAGES = ("checkpoint", "engine")
METHODS = ("int4_awq", "fp8", "smoothquant", "int8")
PLAIN = "none"  # a checkpoint that is converted and not quantized
_QUANTIZER = ("calib_size", "max_seq_length", "batch_size", "calib_dataset")
# The keys that reach the command of the checkpoint, by its method.
USED: Mapping[str, tuple[str, ...]] = {
    "int4_awq": ("awq_block_size", *_QUANTIZER),
    "fp8": _QUANTIZER,
    "smoothquant": ("smoothquant", "per_token", "per_channel", "calib_size", "calib_dataset"),
    "int8": (),
    PLAIN: ("per_channel", "per_token", "int8_kv_cache", "per_group"),
}
BUILD_KEYS = (
    *("max_batch_size", "max_input_len", "max_output_len", "max_beam_width"),
    *("max_num_tokens", "max_prompt_embedding_table_size", "use_fused_mlp"),
)
_EVERYWHERE = ("release", "gpus", "dtype")
_COUNT = Whole(1)


def _release(value: object) -> str:
    """Reads a release; without quotes, YAML has made a number of it."""
    return Choice(("0.9", "1.0"))(str(value) if isinstance(value, float) else value)


class TensorRtLlmConfig(AlgorithmParameters):
    """The block ``llm.TensorRTLLM``: keys of the checkpoint, of the build, and of where the programs are."""

    algorithm: ClassVar[str] = "TensorRTLLM"
    stage_names: ClassVar[tuple[str, ...]] = STAGES
    export_formats: ClassVar[tuple[str, ...]] = ("tensorrt-llm",)
    inert: ClassVar[Mapping[str, Inert]] = {
        "pp_size": Inert(1, "engines are split over GPUs by tensor parallelism alone"),
        "load_by_shard": Inert(False, "the converters of TensorRT-LLM read shard by shard by themselves"),
        "kv_cache_dtype": Inert(None, "the KV cache keeps dtype; int8_kv_cache counts with to_quantize: false"),
    }

    # The checkpoint is what every further build starts from, and takes longest.
    save_intermediate_results: Flag = True
    overwrite: Annotated[bool | tuple[str, ...], BeforeValidator(Overwrite(STAGES))] = False

    # the programs
    release: Annotated[str, BeforeValidator(_release, json_schema_input_type=Literal["0.9", "1.0", 0.9, 1.0])] = "0.9"
    examples_dir: Annotated[Path, BeforeValidator(path)] = Path("TensorRT-LLM/examples")
    gpus: int = Field(default=None, validate_default=True)  # null: as many as CUDA_ID names

    # the checkpoint
    to_quantize: Flag = True
    quant_method: Annotated[str, BeforeValidator(Choice(METHODS))] = "int4_awq"
    dtype: FloatDtype = "float16"
    smoothquant: Annotated[float, BeforeValidator(Real(above=0.0, most=1.0))] = 0.5
    per_channel: Flag = False
    per_token: Flag = False
    calib_dataset: OptionalText = None  # null: the text that TensorRT-LLM takes by itself
    calib_size: Count = 32
    max_seq_length: Count = 2048
    batch_size: Count = 1
    awq_block_size: Count = 128
    int8_kv_cache: Flag = False
    per_group: Flag = False
    hidden_act: OptionalText = None  # null: the model's; another is refused
    rotary_base: OptionalPositive = None

    # the build
    max_batch_size: Count = 1
    max_input_len: OptionalCount = None  # null: 1024, and 32256 for mistral and mixtral
    max_output_len: Count = 1024
    max_beam_width: Count = 1
    max_num_tokens: OptionalCount = None
    max_prompt_embedding_table_size: NumberOrZero = 0
    use_fused_mlp: Flag = False

    pp_size: Count = 1
    load_by_shard: Flag = False
    kv_cache_dtype: OptionalText = None

    @field_validator("gpus", mode="before")
    @classmethod
    def _as_many_as_cuda_id_names(cls, value: object, info: ValidationInfo) -> int:
        return max(1, len((info.context or {}).get("devices", ()))) if value is None else _COUNT(value)

    @field_validator("calib_dataset")
    @classmethod
    def _the_release_can_be_told_the_text(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("release") == "0.9":
            raise expected("null with release 0.9, whose scripts have no option for the text; release 1.0 has one")
        return value

    @property
    def runs_alone(self) -> bool:
        """Other programs do the work, on all devices at once."""
        return True

    @property
    def method(self) -> str:
        """How the checkpoint is quantized."""
        return self.quant_method if self.to_quantize else PLAIN

    @property
    def checkpoint_settings(self) -> Mapping[str, object]:
        """Every value that shapes the checkpoint."""
        dumped = self.model_dump(mode="json")
        return {"method": self.method, **{name: dumped[name] for name in (*_EVERYWHERE, *USED[self.method])}}

    @property
    def build_settings(self) -> Mapping[str, object]:
        """Every value that shapes the engine, apart from its checkpoint."""
        dumped = self.model_dump(mode="json")
        return {name: dumped[name] for name in (*_EVERYWHERE, *BUILD_KEYS)}

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The keys without effect; those of other quantizations in one line."""
        elsewhere = dict.fromkeys(name for names in USED.values() for name in names if name not in USED[self.method])
        fields = type(self).model_fields
        idle = [name for name in elsewhere if self.__dict__[name] != fields[name].default]
        lines = super().warnings(prefix)
        if not idle:
            return lines
        chosen = f"quant_method: {self.method}" if self.to_quantize else "to_quantize: false"
        return (*lines, f"{prefix}{', '.join(idle)} without effect: {chosen} does not use them")
