"""The parameters of AQLM as recipes spell them (``llm.AQLM``), with their ranges and their defaults.

A key is alive, accepted without effect (``inert``, one warning line), or refused with the reason (``Only``). The aliases are
the spellings of AQLM and nyuntam; ``configs.strict`` describes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.strict import AlgorithmParameters, Inert, Parameters
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
    Overwrite,
    Positive,
    Real,
    Seed,
    Whole,
    expected,
    names,
)

STAGES = ("calibration", "finetune", "conversion")
CODE_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")
TOLERANCE = Nullable(Real(least=0.0, below=1.0))  # a loss cannot fall by more than all of it
SHARE = Real(above=0.0, most=1.0)

ROW_SCALES = "0: one float16 scale a row; clients of the AQLM format read no other"
HALF_CODEBOOKS = "16: clients of the AQLM format read float16 codebooks"
ONE_GROUP = "1: it takes effect below 16 bits a codebook value, which no client reads"
ONE_SETTING = "false: the AQLM format has one num_codebooks for the whole model"
USE_CUDA_ID = "null: the devices of a job are CUDA_ID at the top of the recipe"
NO_PICKLE = "false: pickled modules are never read; models and tensors are safetensors"
NO_WANDB = "false: the job writes its figures to metrics.jsonl"
NO_CODE = "null: code from a recipe is never run"

TRUST = Inert(False, "only TRUST_REMOTE_CODE at the top of the recipe counts")
FAST_TOKENIZER = Inert(True, "the fast tokenizer is always used")
SET_BY_JOB = Inert(None, "the job sets it")


class CalibrationConfig(Parameters):
    """The calibration stage. Lengths count tokens, ``num_samples`` includes ``validation_size``."""

    # the text
    num_samples: Count = Field(default=2048, alias="nsamples")
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=4096, alias="model_seqlen")
    seed: Seed = 0
    validation_size: NumberOrZero = Field(default=256, alias="val_size", validate_default=True)

    # the format
    num_codebooks: Count = 1
    bits_per_codebook: Annotated[int, BeforeValidator(Whole(1, 16))] = Field(default=16, alias="nbits_per_codebook")
    in_group_size: Count = 8
    out_group_size: Count = 1
    scale_bits: Annotated[int, BeforeValidator(Only(0, ROW_SCALES))] = Field(default=0, alias="scale_nbits")
    codebook_value_bits: Annotated[int, BeforeValidator(Only(16, HALF_CODEBOOKS))] = Field(
        default=16, alias="codebook_value_nbits"
    )
    codebook_value_num_groups: Annotated[int, BeforeValidator(Only(1, ONE_GROUP))] = 1
    mix_compression: Annotated[bool, BeforeValidator(Only(False, ONE_SETTING))] = False

    # what layers and blocks should reproduce: the original model's outputs, or theirs on the inputs they have now
    targets: Annotated[str, BeforeValidator(Choice(("original", "compressed_prefix")))] = "original"

    # the fit of one linear
    init_max_iterations: Count = Field(default=100, alias="init_max_iter")
    init_max_points_per_centroid: OptionalCount = None
    beam_size: Count = 1
    max_epochs: Count = 100
    steps_per_epoch: Count = 100
    relative_mse_tolerance: Annotated[float | None, BeforeValidator(TOLERANCE)] = 0.01
    lr: Positive = 1e-4

    # the tuning of one block
    finetune_max_epochs: NumberOrZero = 25
    finetune_lr: OptionalPositive = None  # null: steps relative to each tensor's size
    finetune_batch_size: Count = 16
    finetune_early_stop: Count = 3
    finetune_adam_beta1: Momentum = 0.9
    finetune_adam_beta2: Momentum = 0.999
    finetune_keep_best: Flag = True

    # how it runs
    dtype: LoadDtype = "auto"  # of the hidden states kept between blocks; auto is float32
    local_batch_size: OptionalCount = None  # null: micro-batches of about 2048 tokens
    offload_activations: Flag = True
    use_checkpointing: Flag = False
    true_sequential: Flag = False
    skip_out_loss: Flag = False
    print_frequency: Count = 10
    no_quant: Flag = False
    attn_implementation: Attention = None

    # accepted without effect
    resume: Flag = False
    trust_remote_code: Flag = False
    use_fast_tokenizer: Flag = False
    new_eval: Flag = False
    exp_name: OptionalText = None

    # refused unless they ask for nothing
    devices: Annotated[None, BeforeValidator(Only(None, USE_CUDA_ID))] = None
    load: Annotated[None, BeforeValidator(Only(None, "null: a job resumes by itself from what its folder holds"))] = None
    on_save: Annotated[None, BeforeValidator(Only(None, NO_CODE))] = None
    use_faiss: Annotated[bool, BeforeValidator(Only(False, "false: k-means runs in torch"))] = False
    wandb: Annotated[bool, BeforeValidator(Only(False, NO_WANDB))] = False

    inert: ClassVar[Mapping[str, Inert]] = {
        "lr": Inert(1e-4, "codebooks are solved exactly, without a learning rate (block tuning has finetune_lr)"),
        "resume": Inert(True, "a job always resumes at the first unfinished block; overwrite starts again"),
        "trust_remote_code": TRUST,
        "use_fast_tokenizer": FAST_TOKENIZER,
        "new_eval": Inert(False, "name the texts under EVALUATION instead (ptb_new, c4_new)"),
        "exp_name": Inert(None, "JOB_ID names the job"),
    }

    @field_validator("validation_size")
    @classmethod
    def _some_samples_are_left(cls, value: int, info: ValidationInfo) -> int:
        num_samples = info.data.get("num_samples")  # missing where nsamples itself is wrong
        if num_samples is not None and value >= num_samples:
            raise expected(f"fewer validation samples than nsamples, which is {num_samples} and includes them")
        return value


class FinetuneConfig(Parameters):
    """The finetune stage, PV-tuning. ``batch_size`` counts sequences over all ranks, ``microbatch_size`` those of one step."""

    # the text
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=4096, alias="model_seqlen")
    seed: Seed = 1337
    skip_grouping: Flag = False
    eval_datasets: Annotated[tuple[str, ...], BeforeValidator(names)] = ("wikitext2", "c4")
    preprocessing_chunk_length: OptionalCount = None

    # the loop
    max_epochs: NumberOrZero = 10
    batch_size: Count = 256
    microbatch_size: OptionalCount = Field(default=4, validate_default=True)
    eval_every_steps: OptionalCount = 1
    save_every_steps: OptionalCount = 1
    print_every_steps: OptionalCount = 1
    keep_best_model: Flag = False

    # what moves
    update_codes: Flag = True
    update_codebooks_and_scales: Flag = True
    update_non_quantized_parameters: Flag = Field(default=True, validate_default=True)

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
    amp_dtype: FloatDtype = "float32"
    straight_through_buffer_dtype: FloatDtype = "float32"
    code_dtype: Annotated[str, BeforeValidator(Choice(CODE_DTYPES, prefix="torch."))] = "uint16"
    code_adam_16bit: Flag = False
    attn_implementation: Attention = None
    block_type: OptionalText = None
    wrap_separately: Annotated[tuple[str, ...], BeforeValidator(names)] = ()
    gradient_checkpointing: Flag = True
    minimize_sync: Flag = False
    use_fsdp_amp: Flag = False
    limit_parallel_inits: Count = 4
    num_workers: NumberOrZero = 8
    verbose_optimizer: Flag = True

    # accepted without effect
    base_model: OptionalText = None
    cache_dir: OptionalPath = None
    dataset_config_name: OptionalText = None
    split: OptionalText = "none"
    download_num_workers: OptionalCount = None
    overwrite_cache: Flag = False
    preprocessing_keep_in_memory: Flag = False
    preprocessing_num_workers: OptionalCount = None
    trust_remote_code: Flag = False
    use_fast_tokenizer: Flag = False

    # refused unless they ask for nothing
    monkeypatch_old_pickle: Annotated[bool, BeforeValidator(Only(False, NO_PICKLE))] = False
    wandb: Annotated[bool, BeforeValidator(Only(False, NO_WANDB))] = False

    inert: ClassVar[Mapping[str, Inert]] = {
        "base_model": SET_BY_JOB,
        "cache_dir": Inert(None, "CACHE_PATH at the top of the recipe counts"),
        "dataset_config_name": Inert(None, "DATASET_SUBNAME at the top of the recipe counts"),
        "split": Inert("none", "SPLIT at the top of the recipe counts"),
        "download_num_workers": Inert(None, "the hub client decides"),
        "overwrite_cache": Inert(False, "tokens are made again whenever what shapes them changes"),
        "preprocessing_keep_in_memory": Inert(False, "tokens are cached on disk"),
        "preprocessing_num_workers": Inert(None, "the tokenizer brings its own threads"),
        "code_selection_temperature": Inert(0.0, "no release of AQLM has ever used it"),
        "trust_remote_code": TRUST,
        "use_fast_tokenizer": FAST_TOKENIZER,
    }

    @field_validator("microbatch_size")
    @classmethod
    def _microbatches_fill_a_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch_size = info.data.get("batch_size")
        if value is not None and batch_size is not None and batch_size % value:
            raise expected(f"a divisor of batch_size, which is {batch_size}")
        return value

    @field_validator("update_non_quantized_parameters")
    @classmethod
    def _something_moves(cls, value: bool, info: ValidationInfo) -> bool:
        others = (info.data.get(name, True) for name in ("update_codes", "update_codebooks_and_scales"))
        if not value and not any(others):
            raise expected("true here, or for update_codes or update_codebooks_and_scales: all three false tune nothing")
        return value

    @field_validator("eval_datasets")
    @classmethod
    def _tasks_name_their_shots(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            task, colon, shots = name.partition(":")
            if colon and not (task and shots.isdigit()):
                raise expected(f"names of texts, or tasks with their number of examples such as gsm8k:5 (not {name})")
        return value


class ConversionConfig(Parameters):
    """The conversion stage. What it writes is set by the AQLM format, so most of these keys have no effect."""

    attn_implementation: Attention = None
    code_dtype: Annotated[str, BeforeValidator(Choice(CODE_DTYPES, prefix="torch."))] = "int32"
    load_dtype: LoadDtype = "auto"
    trust_remote_code: Flag = False
    base_model: OptionalText = None
    quantized_model: OptionalText = None
    pv_fsdp_dir: OptionalText = None
    save: OptionalText = None

    monkeypatch_old_pickle: Annotated[bool, BeforeValidator(Only(False, NO_PICKLE))] = False
    p_finetuned_state_dict: Annotated[None, BeforeValidator(Only(None, "null: the finetune stage of the job is read"))] = None

    inert: ClassVar[Mapping[str, Inert]] = {
        "attn_implementation": Inert(None, "conversion runs no model"),
        "code_dtype": Inert("int32", "the format stores codes as int8 up to 8 bits a codebook, as int16 above"),
        "load_dtype": Inert("auto", "the format stores float16"),
        "trust_remote_code": TRUST,
        "base_model": SET_BY_JOB,
        "quantized_model": SET_BY_JOB,
        "pv_fsdp_dir": SET_BY_JOB,
        "save": SET_BY_JOB,
    }


class AqlmConfig(AlgorithmParameters):
    """The block ``llm.AQLM``. An absent block means its defaults; ``finetune_config: null`` leaves the tuning out."""

    algorithm: ClassVar[str] = "AQLM"
    stage_names: ClassVar[tuple[str, ...]] = STAGES
    export_formats: ClassVar[tuple[str, ...]] = ("aqlm", "dense")

    save_intermediate_results: Flag = False
    dtype: FloatDtype = "float16"
    overwrite: Annotated[bool | tuple[str, ...], BeforeValidator(Overwrite(STAGES))] = False
    calibration_config: CalibrationConfig = Field(default_factory=CalibrationConfig)
    finetune_config: FinetuneConfig | None = Field(default_factory=FinetuneConfig)
    conversion_config: ConversionConfig = Field(default_factory=ConversionConfig)

    inert: ClassVar[Mapping[str, Inert]] = {"dtype": Inert("float16", "the format stores float16")}

    @property
    def tunes(self) -> bool:
        """Whether the finetune stage has anything to do."""
        return self.finetune_config is not None and self.finetune_config.max_epochs > 0

    @property
    def evaluate_only(self) -> bool:
        """Whether the recipe asks for figures of the uncompressed model and nothing else."""
        return self.calibration_config.no_quant

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect, and one for tuning that a run would refuse."""
        lines = super().warnings(prefix)
        if self.calibration_config.true_sequential and self.calibration_config.targets == "original":
            key = f"{prefix}calibration_config.true_sequential"
            lines = (*lines, f"{key} has no effect: targets: original implies it; it counts with targets: compressed_prefix")
        if not self.tunes:
            return lines
        key = f"{prefix}finetune_config"
        return (*lines, f"{key} asks for PV-tuning, which this version does not have: a run is refused until it is null")

    def refusal(self, stages: Sequence[str] | None) -> str | None:
        """PV-tuning is checked but not there yet."""
        if not self.tunes or (stages is not None and "finetune" not in stages):
            return None
        return (
            "llm.AQLM.finetune_config asks for PV-tuning, which this version does not have. Leave it out with "
            "llm.AQLM.finetune_config=null, or calibrate now with STAGES=[calibration] and tune the result later."
        )

    def memory_remedies(self) -> tuple[str, ...]:
        """Overrides that need less memory, those that leave the result as it is first."""
        calibration, tuning = self.calibration_config, self.finetune_config
        remedies = [
            ("calibration_config.local_batch_size=1", calibration.local_batch_size != 1),
            ("calibration_config.offload_activations=true", not calibration.offload_activations),
            ("calibration_config.use_checkpointing=true", not calibration.use_checkpointing),
            ("finetune_config.microbatch_size=1", tuning is not None and self.tunes and tuning.microbatch_size != 1),
            (f"calibration_config.model_seqlen={calibration.sequence_length // 2}", calibration.sequence_length > 3),
        ]
        return tuple(override for override, helps in remedies if helps)
