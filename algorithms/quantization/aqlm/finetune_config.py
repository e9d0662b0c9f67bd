"""The keys of ``llm.AQLM.finetune_config``: PV-Tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from algorithms.finetuning.checks import divides_a_batch, has_held_out
from algorithms.quantization.aqlm.keys import CODE_DTYPES, FAST_TOKENIZER, NO_PICKLE, SET_BY_JOB, SHARE, TRUST
from configs.strict import Inert, Parameters
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
    Only,
    OptionalCount,
    OptionalPath,
    OptionalPositive,
    OptionalText,
    Positive,
    Real,
    Seed,
    Whole,
    expected,
    flag,
    names,
)

_FOLLOWED = ("update_codebooks_and_scales", "update_non_quantized_parameters")
_FOLLOWS = {"update_codebooks": _FOLLOWED[0], "update_scales": _FOLLOWED[0]} | {
    "update_norms": _FOLLOWED[1],
    "update_embeddings": _FOLLOWED[1],
}
OptionalFlag = Annotated[bool | None, BeforeValidator(Nullable(flag))]
# Keys that change how a tuning runs, or what it says, but not what comes out of it beyond rounding.
NOT_SHAPING = {
    "eval_datasets", "save_every_steps", "print_every_steps", "microbatch_size", "gradient_checkpointing", "minimize_sync",
    "use_fsdp_amp", "wrap_separately", "code_dtype", "verbose_optimizer", "sequence_length", "num_samples", "skip_grouping",
    "wandb",
}  # fmt: skip


class FinetuneConfig(Parameters):
    """The finetune stage, PV-Tuning. ``batch_size`` counts sequences over all ranks, ``microbatch_size`` those of one pass."""

    # the text
    num_samples: OptionalCount = Field(default=None, alias="nsamples")  # null: all that the text has
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=4096, alias="model_seqlen")
    validation_size: Annotated[int | None, BeforeValidator(Nullable(Whole(0)))] = Field(default=None, alias="val_size")
    seed: Seed = 1337
    skip_grouping: Flag = False
    eval_datasets: Annotated[tuple[str, ...], BeforeValidator(names)] = ("wikitext2", "c4")

    # the loop
    max_epochs: NumberOrZero = 10
    batch_size: Count = 256
    microbatch_size: Annotated[OptionalCount, AfterValidator(divides_a_batch)] = Field(default=4, validate_default=True)
    lr_schedule: Annotated[str, BeforeValidator(Choice(("constant", "cosine")))] = "constant"
    warmup_steps: NumberOrZero = 0
    max_grad_norm: OptionalPositive = None
    eval_every_steps: OptionalCount = None  # null: after each epoch
    save_every_steps: OptionalCount = None  # null: after each epoch, and after ten minutes
    print_every_steps: OptionalCount = 1
    keep_best_model: Annotated[Flag, AfterValidator(has_held_out)] = False
    teacher_cache: OptionalCount = None  # so many logits of every position; null: the teacher runs in every step

    # what moves; null follows the key that names both
    update_codes: Flag = True
    update_codebooks_and_scales: Flag = True
    update_codebooks: OptionalFlag = None
    update_scales: OptionalFlag = None
    update_non_quantized_parameters: Flag = True
    update_norms: OptionalFlag = None  # and biases
    update_embeddings: OptionalFlag = Field(default=None, validate_default=True)  # and the head

    # continuous parameters
    lr: Positive = 1e-4
    adam_beta1: Momentum = 0.9
    adam_beta2: Momentum = 0.95
    amsgrad: Flag = False
    lamb: Flag = True
    debias: Flag = True

    # codes
    code_lr: Positive = 1e-3
    code_beta1: Momentum = 0.0
    code_beta2: Momentum = 0.95
    code_trust_ratio: Annotated[float | None, BeforeValidator(Nullable(SHARE))] = 0.01
    max_code_change_per_step: Annotated[float, BeforeValidator(SHARE)] = 0.01
    force_code_update: Flag = False
    code_selection_temperature: Annotated[float, BeforeValidator(Real(least=0.0))] = 0.0
    delta_decay: Annotated[float, BeforeValidator(Real(least=0.0, most=1.0))] = 0.0
    beam_size: Count = 1

    # how it runs
    load_dtype: LoadDtype = "float32"
    master_dtype: FloatDtype = "float32"
    amp_dtype: FloatDtype = Field(default="float32", validate_default=True)
    straight_through_buffer_dtype: FloatDtype = "float32"
    code_dtype: Annotated[str, BeforeValidator(Choice(CODE_DTYPES, prefix="torch."))] = "uint16"
    code_adam_16bit: Flag = False
    attn_implementation: Attention = None
    wrap_separately: Annotated[tuple[str, ...], BeforeValidator(names)] = ()
    gradient_checkpointing: Flag = True
    minimize_sync: Flag = False
    use_fsdp_amp: Flag = False
    verbose_optimizer: Flag = True
    wandb: Flag = False  # tracks the whole job

    # accepted without effect
    base_model: OptionalText = None
    block_type: OptionalText = None
    cache_dir: OptionalPath = None
    dataset_config_name: OptionalText = None
    split: OptionalText = "none"
    download_num_workers: OptionalCount = None
    limit_parallel_inits: Count = 4
    num_workers: NumberOrZero = 8
    overwrite_cache: Flag = False
    preprocessing_chunk_length: OptionalCount = None
    preprocessing_keep_in_memory: Flag = False
    preprocessing_num_workers: OptionalCount = None
    trust_remote_code: Flag = False
    use_fast_tokenizer: Flag = False

    # refused unless they ask for nothing
    monkeypatch_old_pickle: Annotated[bool, BeforeValidator(Only(False, NO_PICKLE))] = False

    inert: ClassVar[Mapping[str, Inert]] = {
        "base_model": SET_BY_JOB,
        "block_type": Inert(None, "the architecture table knows the blocks of every model"),
        "cache_dir": Inert(None, "CACHE_PATH at the top of the recipe counts"),
        "dataset_config_name": Inert(None, "DATASET_SUBNAME at the top of the recipe counts"),
        "split": Inert("none", "SPLIT at the top of the recipe counts"),
        "download_num_workers": Inert(None, "the hub client decides"),
        "limit_parallel_inits": Inert(4, "every rank reads one block at a time"),
        "num_workers": Inert(8, "the tokens are in memory"),
        "overwrite_cache": Inert(False, "tokens are made again whenever what shapes them changes"),
        "preprocessing_chunk_length": Inert(None, "long texts are tokenised whole and cut into windows"),
        "preprocessing_keep_in_memory": Inert(False, "tokens are cached on disk"),
        "preprocessing_num_workers": Inert(None, "the tokenizer brings its own threads"),
        "trust_remote_code": TRUST,
        "use_fast_tokenizer": FAST_TOKENIZER,
    }

    @property
    def moves(self) -> Mapping[str, bool]:
        """What is tuned: codes, codebooks, scales, norms (with biases) and embeddings (with the head)."""
        own = {name: getattr(self, name) for name in _FOLLOWS}
        followed = {name: getattr(self, _FOLLOWS[name]) if value is None else value for name, value in own.items()}
        return {"codes": self.update_codes} | {name.removeprefix("update_"): value for name, value in followed.items()}

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes the result."""
        free = {*NOT_SHAPING, *self.inert, *(() if self.keep_best_model else ("eval_every_steps",))}
        values = self.model_dump(mode="json", exclude=free)
        return {name: value for name, value in values.items() if not name.startswith("update_")} | dict(self.moves)

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect."""
        tasks = [name for name in self.eval_datasets if ":" in name]
        left_out = f"{prefix}eval_datasets: {', '.join(tasks)} left out: tasks are not measured during tuning"
        return (*super().warnings(prefix), *([left_out] if tasks else []))

    @field_validator("amp_dtype")
    @classmethod
    def _products_are_no_wider_than_what_they_are_of(cls, value: str, info: ValidationInfo) -> str:
        master = info.data.get("master_dtype", "float32")
        if master not in ("float32", value):
            raise expected(f"{master} like master_dtype, or master_dtype: float32")
        return value

    @field_validator("update_embeddings")
    @classmethod
    def _something_moves(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        known = {
            name: info.data.get(name, True) for name in ("update_codes", *_FOLLOWED)
        }  # missing: it has an error of its own
        followers = {"update_embeddings": value, **{name: info.data.get(name) for name in _FOLLOWS if name != info.field_name}}
        moving = [known[_FOLLOWS[name]] if own is None else own for name, own in followers.items()]
        if not (known["update_codes"] or any(moving)):
            raise expected("true here, or for another update_ key: all of them false tune nothing")
        return value

    @field_validator("eval_datasets")
    @classmethod
    def _tasks_name_their_shots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            task, colon, shots = name.partition(":")
            if colon and not (task and shots.isdigit()):
                raise expected(f"names of texts, or tasks with their number of examples such as gsm8k:5 (not {name})")
        return value
