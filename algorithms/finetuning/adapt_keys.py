"""Keys of nyuntam-adapt, as recipes spell them beside a plugin's own, and what they are in ``recovery``. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from algorithms.finetuning.recovery_config import RecoveryConfig
from configs.strict import Inert, Parameters
from configs.values import (
    Choice,
    Nullable,
    Only,
    OptionalCount,
    OptionalPositive,
    Real,
    Whole,
    expected,
    flag,
    inside,
    names,
    text,
)

_SCHEDULERS = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
}
# Keys of the same meaning: name here -> name in ``recovery``.
_TWINS = {
    "r": "rank",
    "alpha": "alpha",
    "dropout": "dropout",
    "target_modules": "target_modules",
    "epochs": "max_epochs",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_seq_length": "sequence_length",
    "lr": "lr",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "adam_eps": "adam_eps",
}
_OF_LORA = ("r", "alpha", "dropout", "target_modules")
# Moments are float32 by any of these names.
_ADAM = (
    "adam", "adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_anyprecision", "paged_adamw", "paged_adamw_32bit",
    "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit",
)  # fmt: skip

_BITSANDBYTES = "weights stay as they are: bitsandbytes' rounding would be part of what the tuning recovers from"

OptionalFlag = Annotated[bool | None, BeforeValidator(Nullable(flag))]
OptionalShare = Annotated[float | None, BeforeValidator(Nullable(Real(least=0.0, below=1.0)))]
OptionalNumber = Annotated[int | None, BeforeValidator(Nullable(Whole(0)))]
OptionalNames = Annotated[tuple[str, ...] | None, BeforeValidator(Nullable(names))]
Anything = Annotated[object, BeforeValidator(lambda value: value)]
# Of keys without effect, where null and false are equally harmless.
IdleFlag = Annotated[
    bool, BeforeValidator(lambda value: False if value is None else flag(value), json_schema_input_type=bool | None)
]
IdlePath = Annotated[object, BeforeValidator(lambda value: value or False)]


def _optimizer(value: object) -> str:
    return Choice(_ADAM)(value.casefold() if isinstance(value, str) else value)


def _peft_method(value: object) -> str:
    if not isinstance(value, str) or value.casefold() != "lora":
        raise expected("LoRA, the only one of its kind here (FULL_FINE_TUNING: true tunes everything)")
    return "lora"


def _interval(value: object) -> str:
    return Choice(("epoch", "steps"))(value.casefold() if isinstance(value, str) else value)


class AdaptKeys(Parameters):
    """What a plugin with a recovery stage inherits: ``to_finetune``, ``recovery``, and the keys of nyuntam-adapt.

    ``BATCH_SIZE`` times ``GRADIENT_ACCUMULATION_STEPS`` is the batch of all ranks together, ``BATCH_SIZE`` that of a pass.
    A key of nyuntam-adapt that has a twin in ``recovery`` is that twin; ``recovering`` is both together.
    """

    to_finetune: OptionalFlag = None
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)

    # what is tuned, and whether
    do_train: OptionalFlag = Field(default=None, alias="DO_TRAIN")
    full_fine_tuning: OptionalFlag = Field(default=None, alias="FULL_FINE_TUNING")
    peft_method: Annotated[str | None, BeforeValidator(Nullable(_peft_method, unset=True))] = Field(
        default=None, alias="PEFT_METHOD"
    )
    peft_type_lora: Annotated[str | None, BeforeValidator(Nullable(_peft_method, unset=True))] = None
    r: OptionalCount = None
    alpha: OptionalPositive = None
    dropout: OptionalShare = None
    target_modules: OptionalNames = None

    # the loop
    epochs: OptionalNumber = Field(default=None, alias="EPOCHS")
    batch_size: OptionalCount = Field(default=None, alias="BATCH_SIZE")
    gradient_accumulation_steps: OptionalCount = Field(default=None, alias="GRADIENT_ACCUMULATION_STEPS")
    gradient_checkpointing: OptionalFlag = Field(default=None, alias="GRADIENT_CHECKPOINTING")
    interval: Annotated[str | None, BeforeValidator(Nullable(_interval))] = Field(default=None, alias="INTERVAL")
    interval_steps: OptionalCount = Field(default=None, alias="INTERVAL_STEPS")
    max_seq_length: Annotated[int | None, BeforeValidator(Nullable(Whole(2)))] = None
    packing: OptionalFlag = None

    # the optimizer
    optimizer: Annotated[str | None, BeforeValidator(Nullable(_optimizer))] = Field(default=None, alias="OPTIMIZER")
    lr: OptionalPositive = Field(default=None, alias="LR")
    scheduler_type: Annotated[str | None, BeforeValidator(Nullable(Choice(tuple(_SCHEDULERS))))] = Field(
        default=None, alias="SCHEDULER_TYPE"
    )
    weight_decay: OptionalShare = Field(default=None, alias="WEIGHT_DECAY")
    beta1: OptionalShare = Field(default=None, alias="BETA1")
    beta2: OptionalShare = Field(default=None, alias="BETA2")
    adam_eps: OptionalPositive = Field(default=None, alias="ADAM_EPS")

    # accepted without effect
    do_eval: Anything = Field(default=None, alias="DO_EVAL")
    num_workers: Anything = Field(default=None, alias="NUM_WORKERS")
    steps: Anything = Field(default=None, alias="STEPS")
    no_of_checkpoints: Anything = Field(default=None, alias="NO_OF_CHECKPOINTS")
    fp16: IdleFlag = Field(default=False, alias="FP16")
    resume_from_checkpoint: IdlePath = Field(default=False, alias="RESUME_FROM_CHECKPOINT")
    group_by_length: IdleFlag = Field(default=False, alias="GROUP_BY_LENGTH")
    last_layer_tuning: IdleFlag = Field(default=False, alias="LAST_LAYER_TUNING")
    fan_in_fan_out: IdleFlag = False
    load_in_4bit: IdleFlag = False
    load_in_8bit: IdleFlag = False
    bnb_4bit_compute_dtype: Anything = None
    bnb_4bit_quant_type: Anything = None
    bnb_4bit_quant_storage: Anything = None
    bnb_4bit_use_double_quant: Anything = None
    llm_int8_threshold: Anything = None
    llm_int8_skip_modules: Anything = None
    llm_int8_enable_fp32_cpu_offload: Anything = None
    llm_int8_has_fp16_weight: Anything = None
    dataset_text_field: Anything = None
    flash_attention2: IdleFlag = False
    blocksize: Anything = None
    save_method: Anything = Field(default=None, alias="SAVE_METHOD")

    # refused unless they ask for nothing
    init_lora_weights: Annotated[bool | None, BeforeValidator(Nullable(Only(True, "true: adapters start at zero")))] = None
    peft_type_ssf: Annotated[str | None, BeforeValidator(Nullable(text, unset=True))] = None

    inert: ClassVar[Mapping[str, Inert]] = {
        "do_eval": Inert(None, "recovery.val_size and recovery.keep_best say what is judged"),
        "num_workers": Inert(None, "the tokens are in memory"),
        "steps": Inert(None, "EPOCHS decides how long the tuning is"),
        "no_of_checkpoints": Inert(None, "the newest checkpoint and the best state are kept until the stage ends"),
        "fp16": Inert(False, "recovery.amp_dtype is the dtype of the products; float16 holds too little of the gradient"),
        "resume_from_checkpoint": Inert(False, "a job that is run again goes on from its newest checkpoint"),
        "group_by_length": Inert(False, "batches are drawn by the seed alone"),
        "last_layer_tuning": Inert(False, "full tuning moves the head too, LoRA the linears of the blocks"),
        "fan_in_fan_out": Inert(False, "no linear here is stored transposed"),
        "load_in_4bit": Inert(False, _BITSANDBYTES),
        "load_in_8bit": Inert(False, _BITSANDBYTES),
        **{
            f"bnb_4bit_{name}": Inert(None, _BITSANDBYTES)
            for name in ("compute_dtype", "quant_type", "quant_storage", "use_double_quant")
        },
        **{
            f"llm_int8_{name}": Inert(None, _BITSANDBYTES)
            for name in ("threshold", "skip_modules", "enable_fp32_cpu_offload", "has_fp16_weight")
        },
        "dataset_text_field": Inert(None, "TEXT_COLUMN at the top of the recipe counts"),
        "flash_attention2": Inert(False, "recovery.attn_implementation chooses"),
        "blocksize": Inert(None, "recovery.model_seqlen is the length of a sequence"),
        "save_method": Inert(None, "EXPORT at the top of the recipe names the formats"),
        "peft_type_ssf": Inert(None, "PEFT_METHOD is LoRA"),
    }

    @property
    def recovers(self) -> bool:
        """Whether there is a recovery stage with anything to do."""
        return bool(self.to_finetune) and self.do_train is not False and self.recovering.max_epochs > 0

    @property
    def recovering(self) -> RecoveryConfig:
        """``recovery`` with what the keys of nyuntam-adapt say."""
        return self.recovery.model_copy(update={name: value for name, (_, value) in self._said().items()})

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect, and of a recovery that is left out."""
        lines, given = super().warnings(prefix), self._given()
        if not self.to_finetune:
            ours = tuple(f"{prefix}{key} " for key in given)
            lines = tuple(line for line in lines if not line.startswith(ours))
        if self.to_finetune is None:
            lines += (f"{prefix}to_finetune is missing, which means false: nothing is tuned after the compression",)
        if given and not self.to_finetune:
            return (*lines, f"{prefix}to_finetune is not true, so these have no effect: {', '.join(given)}")
        if self.to_finetune and self.do_train is False:
            return (*lines, f"{prefix}DO_TRAIN is false: nothing is tuned after the compression")
        idle = [name for name in _OF_LORA if getattr(self, name) is not None] if self.recovering.method == "full" else []
        return (*lines, *(f"{prefix}{name} has no effect: all weights are tuned, not adapters" for name in idle))

    @model_validator(mode="after")
    def _nothing_is_said_twice(self) -> Self:
        for name, (key, value) in self._said().items():
            if name in self.recovery.model_fields_set:
                twin = RecoveryConfig.model_fields[name].alias or name
                with inside((key,), value):
                    raise expected(f"this key or recovery.{twin}, which are one; both are given")
        return self

    def _said(self) -> Mapping[str, tuple[str, object]]:
        """Field of ``recovery`` -> the key that speaks of it, and what it says."""
        fields = AdaptKeys.model_fields
        said = {
            twin: (fields[name].alias or name, getattr(self, name))
            for name, twin in _TWINS.items()
            if getattr(self, name) is not None
        }
        if self.full_fine_tuning is not None:
            said["method"] = "FULL_FINE_TUNING", "full" if self.full_fine_tuning else "lora"
        elif self.peft_method or self.peft_type_lora:
            said["method"] = "PEFT_METHOD", "lora"
        if self.batch_size is not None or self.gradient_accumulation_steps is not None:
            key = "GRADIENT_ACCUMULATION_STEPS" if self.batch_size is None else "BATCH_SIZE"
            size = self.batch_size or RecoveryConfig().batch_size
            said["batch_size"] = key, size * (self.gradient_accumulation_steps or 1)
            said["micro_batch_size"] = key, size
        if self.scheduler_type is not None:
            said["lr_schedule"] = "SCHEDULER_TYPE", _SCHEDULERS[self.scheduler_type]
        if self.packing is not None:
            said["skip_grouping"] = "packing", not self.packing
        if self.interval == "steps" and self.interval_steps is not None:
            said |= {name: ("INTERVAL_STEPS", self.interval_steps) for name in ("eval_every_steps", "save_every_steps")}
        return said

    def _given(self) -> list[str]:
        """The keys of this class that are set, in their order, but ``to_finetune``."""
        fields = AdaptKeys.model_fields.items()
        return [field.alias or name for name, field in fields if name in self.model_fields_set and name != "to_finetune"]
