"""The keys of ``recovery: {...}``: distillation of a compressed dense model from the original. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.strict import Parameters
from configs.values import (
    Attention,
    Choice,
    Count,
    Flag,
    FloatDtype,
    LoadDtype,
    Momentum,
    Nullable,
    NumberOrZero,
    OptionalCount,
    OptionalPositive,
    Positive,
    Real,
    Seed,
    Whole,
    expected,
    flag,
    names,
)

METHODS = ("full", "lora")
SCHEDULES = ("constant", "linear", "cosine")
# By method: a full tuning's is a share of each tensor's size, which holds at every width; adapters start without one.
RATES = {"full": 1e-3, "lora": 2e-3}

Decay = Annotated[float, BeforeValidator(Real(least=0.0, below=1.0))]
Names = Annotated[tuple[str, ...], BeforeValidator(names)]

# Keys that change how a recovery runs, or what it says, but not what comes out of it beyond rounding.
NOT_SHAPING = {
    "eval_datasets", "save_every_steps", "print_every_steps", "micro_batch_size", "gradient_checkpointing",
    "sequence_length", "num_samples", "skip_grouping",
}  # fmt: skip
_OF_LORA = {"rank", "alpha", "dropout", "target_modules"}
_OF_FULL = {"update_norms", "update_embeddings"}


class RecoveryConfig(Parameters):
    """Recovery tuning. ``batch_size`` counts sequences over all ranks, ``micro_batch_size`` those of one pass.

    ``lr: null`` is the method's own rate; ``lamb: null`` is true for full tuning at that rate, and otherwise false: a rate that
    was chosen for Adam stays one. ``target_modules`` name linears by the end of their names; empty is all of a block's.
    """

    method: Annotated[str, BeforeValidator(Choice(METHODS))] = "full"

    # the text
    num_samples: OptionalCount = Field(default=None, alias="nsamples")  # null: all that the text has
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=2048, alias="model_seqlen")
    validation_size: Annotated[int | None, BeforeValidator(Nullable(Whole(0)))] = Field(default=None, alias="val_size")
    seed: Seed = 0
    skip_grouping: Flag = False
    eval_datasets: Names = ()

    # the loop
    max_epochs: NumberOrZero = 3
    batch_size: Count = 4
    micro_batch_size: OptionalCount = Field(default=None, validate_default=True)  # null: a rank's whole share at once
    lr_schedule: Annotated[str, BeforeValidator(Choice(SCHEDULES))] = "cosine"
    warmup_steps: NumberOrZero = 10
    max_grad_norm: OptionalPositive = None
    eval_every_steps: OptionalCount = None  # null: after each epoch
    save_every_steps: OptionalCount = None  # null: after each epoch, and after ten minutes
    print_every_steps: OptionalCount = 1
    keep_best: Flag = Field(default=True, validate_default=True)
    teacher_cache: OptionalCount = None  # so many logits of every position; null: the teacher runs in every step

    # the optimizer
    lr: OptionalPositive = None
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    adam_eps: Positive = 1e-6
    lamb: Annotated[bool | None, BeforeValidator(Nullable(flag))] = None  # lr is then a share of each tensor's size
    weight_decay: Decay = 0.0

    # what moves
    update_norms: Flag = True  # and biases; with method: full
    update_embeddings: Flag = True  # and the head; with method: full
    rank: Count = Field(default=16, alias="r")
    alpha: Positive = 32.0
    dropout: Decay = 0.0
    target_modules: Names = ()

    # how it runs
    load_dtype: LoadDtype = "float32"
    amp_dtype: FloatDtype = "float32"
    attn_implementation: Attention = None
    gradient_checkpointing: Flag = False

    @property
    def rate(self) -> float:
        """The learning rate, ``lr`` or the method's own."""
        return RATES[self.method] if self.lr is None else self.lr

    @property
    def uses_lamb(self) -> bool:
        """Whether the rate is a share of each tensor's size."""
        return self.method == "full" and self.lr is None if self.lamb is None else self.lamb

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes the result."""
        free = {*NOT_SHAPING, *(_OF_LORA if self.method == "full" else _OF_FULL)}
        free |= set() if self.keep_best else {"eval_every_steps"}
        return self.model_dump(mode="json", exclude=free) | {"lr": self.rate, "lamb": self.uses_lamb}

    @field_validator("micro_batch_size")
    @classmethod
    def _micro_batches_fill_a_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")
        if value is not None and batch_size is not None and batch_size % value:
            raise expected(f"a divisor of batch_size, which is {batch_size}")
        return value

    @field_validator("keep_best")
    @classmethod
    def _something_is_held_out(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("validation_size") == 0:
            raise expected("false, since val_size is 0: the best state is that of the lowest divergence on held-out sequences")
        return value
