"""The parameters of AQLM as recipes spell them (``llm.AQLM``), with their ranges and their defaults.

A key is alive, accepted without effect (``inert``, one warning line), or refused with the reason (``Only``). The aliases are
the spellings of AQLM and nyuntam; ``configs.strict`` describes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from algorithms.quantization.aqlm.finetune_config import FinetuneConfig
from algorithms.quantization.aqlm.keys import (
    CODE_DTYPES,
    FAST_TOKENIZER,
    HALF_CODEBOOKS,
    NO_CODE,
    NO_PICKLE,
    ONE_GROUP,
    ONE_SETTING,
    ROW_SCALES,
    SET_BY_JOB,
    TOLERANCE,
    TRUST,
    USE_CUDA_ID,
)
from configs.strict import AlgorithmParameters, Inert, Parameters
from configs.values import (
    Attention,
    Choice,
    Count,
    Flag,
    FloatDtype,
    LoadDtype,
    Momentum,
    NumberOrZero,
    Only,
    OptionalCount,
    OptionalPositive,
    OptionalText,
    Overwrite,
    Positive,
    Seed,
    Whole,
    expected,
)

STAGES = ("calibration", "finetune", "conversion")


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
    min_expert_tokens: OptionalCount = None  # an expert of a mixture that is given fewer is calibrated on all tokens
    skip_out_loss: Flag = False
    print_frequency: Count = 10
    no_quant: Flag = False
    wandb: Flag = False  # tracks the whole job
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

    @property
    def tracks(self) -> bool:
        """Whether one of the stages asks for wandb."""
        return self.calibration_config.wandb or (self.finetune_config is not None and self.finetune_config.wandb)

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect."""
        lines = super().warnings(prefix)
        if self.calibration_config.true_sequential and self.calibration_config.targets == "original":
            key = f"{prefix}calibration_config.true_sequential"
            lines = (*lines, f"{key} has no effect: targets: original implies it; it counts with targets: compressed_prefix")
        return lines

    def memory_remedies(self) -> tuple[str, ...]:
        """Overrides that need less memory, those that leave the result as it is first."""
        calibration, tuning = self.calibration_config, self.finetune_config
        remedies = [
            ("calibration_config.local_batch_size=1", calibration.local_batch_size != 1),
            ("calibration_config.offload_activations=true", not calibration.offload_activations),
            ("calibration_config.use_checkpointing=true", not calibration.use_checkpointing),
            ("finetune_config.microbatch_size=1", tuning is not None and self.tunes and tuning.microbatch_size != 1),
            ("finetune_config.gradient_checkpointing=true", tuning is not None and not tuning.gradient_checkpointing),
            (f"calibration_config.model_seqlen={calibration.sequence_length // 2}", calibration.sequence_length > 3),
        ]
        return tuple(override for override, helps in remedies if helps)
