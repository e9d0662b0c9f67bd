"""The keys that every tuning of a whole model by :mod:`algorithms.finetuning.distillation` has. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from algorithms.finetuning.checks import divides_a_batch, has_held_out
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
    names,
)

SCHEDULES = ("constant", "linear", "cosine")
Decay = Annotated[float, BeforeValidator(Real(least=0.0, below=1.0))]
Names = Annotated[tuple[str, ...], BeforeValidator(names)]

# Keys that change how a tuning runs, or what it says, but not what comes out of it beyond rounding.
NOT_SHAPING = frozenset(
    {
        "eval_datasets", "save_every_steps", "print_every_steps", "micro_batch_size", "gradient_checkpointing",
        "sequence_length", "num_samples", "skip_grouping",
    }
)  # fmt: skip


class DistillationKeys(Parameters):
    """Text, loop and execution. ``batch_size`` counts sequences over all ranks, ``micro_batch_size`` those of one pass."""

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
    # null: a rank's whole share at once
    micro_batch_size: Annotated[OptionalCount, AfterValidator(divides_a_batch)] = Field(default=None, validate_default=True)
    lr_schedule: Annotated[str, BeforeValidator(Choice(SCHEDULES))] = "cosine"
    warmup_steps: NumberOrZero = 10
    max_grad_norm: OptionalPositive = None
    eval_every_steps: OptionalCount = None  # null: after each epoch
    save_every_steps: OptionalCount = None  # null: after each epoch, and after ten minutes
    print_every_steps: OptionalCount = 1
    keep_best: Annotated[Flag, AfterValidator(has_held_out)] = Field(default=True, validate_default=True)
    teacher_cache: OptionalCount = None  # so many logits of every position; null: the teacher runs in every step

    # the optimizer
    lr: OptionalPositive = None
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    adam_eps: Positive = 1e-6
    weight_decay: Decay = 0.0

    # how it runs
    load_dtype: LoadDtype = "float32"
    amp_dtype: FloatDtype = "float32"
    attn_implementation: Attention = None
    gradient_checkpointing: Flag = False
