"""The keys that every block-wise method with codes has in common, as recipes spell them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from algorithms.finetuning.config import BlockTuningConfig
from configs.strict import AlgorithmParameters
from configs.values import (
    Attention,
    Choice,
    Count,
    Flag,
    LoadDtype,
    Nullable,
    OptionalCount,
    Overwrite,
    Seed,
    Whole,
    expected,
)

STAGES = ("calibration", "conversion")
# Keys that change how a calibration runs, not what comes out of it beyond rounding; the tokens' key holds the last three.
NOT_SHAPING = frozenset(
    {"save_intermediate_results", "overwrite", "offload_activations", "num_samples", "sequence_length", "validation_size"}
)


def columns_a_group(value: object) -> int:
    """Reads a group size: a whole number, or -1 (null in some recipes) for the whole row."""
    size = -1 if value is None else _GROUP(value)
    if size == 0:
        raise expected("a whole number of at least 1, or -1 for the whole row")
    return size


_GROUP = Whole(-1)
GroupSize = Annotated[int, BeforeValidator(columns_a_group, json_schema_input_type=int | None)]


class BlockwiseParameters(AlgorithmParameters):
    """Text, targets, tuning and execution. Lengths count tokens, ``num_samples`` includes ``validation_size``."""

    stage_names: ClassVar[tuple[str, ...]] = STAGES

    save_intermediate_results: Flag = False
    overwrite: Annotated[bool | tuple[str, ...], BeforeValidator(Overwrite(STAGES))] = False

    # the text
    num_samples: Count = Field(default=128, alias="nsamples")
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=2048, alias="model_seqlen")
    seed: Seed = 0
    # null: an eighth of nsamples where blocks are tuned, none where they are not
    validation_size: Annotated[int | None, BeforeValidator(Nullable(Whole(0)))] = Field(
        default=None, alias="val_size", validate_default=True
    )

    # what layers and blocks should reproduce: the original's residual stream, or their outputs on the inputs they have now
    targets: Annotated[str, BeforeValidator(Choice(("original", "compressed_prefix")))] = "original"
    # sequences whose original hidden states are followed; null: 24 tokens for each input of the widest linear, all with tuning
    reference_samples: OptionalCount = None
    true_sequential: Flag = False
    # an expert of a mixture that is given fewer tokens is calibrated on all; null: a quarter of an expert's mean, at most one a
    # feature of its input
    min_expert_tokens: OptionalCount = None
    block_tuning: BlockTuningConfig | None = None

    # how it runs
    dtype: LoadDtype = "auto"  # of the hidden states kept between blocks; auto is float32
    offload_activations: Flag = True
    attn_implementation: Attention = None

    @field_validator("validation_size")
    @classmethod
    def _some_samples_are_left(cls, value: int | None, info: ValidationInfo) -> int | None:
        num_samples = info.data.get("num_samples")  # missing where nsamples itself is wrong
        if value is not None and num_samples is not None and value >= num_samples:
            raise expected(f"fewer validation samples than nsamples, which is {num_samples} and includes them")
        return value

    @property
    def held_out(self) -> int:
        """Validation samples."""
        if self.validation_size is not None:
            return self.validation_size
        return self.num_samples // 8 if self.block_tuning is not None else 0

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes a calibration, apart from the text."""
        dumped = self.model_dump(mode="json")
        settings = {name: value for name, value in dumped.items() if name not in NOT_SHAPING and name not in self.inert}
        if self.targets == "original":
            settings.pop("true_sequential")  # implied
        if self.min_expert_tokens is None:
            settings.pop("min_expert_tokens", None)
        if self.targets != "original" or self.block_tuning is not None:
            settings.pop("reference_samples")  # none is followed, or all are
        if self.block_tuning is not None:
            settings["block_tuning"] = self.block_tuning.shaping
        return settings

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect."""
        lines = list(super().warnings(prefix))
        if self.true_sequential and self.targets == "original":
            key = f"{prefix}true_sequential"
            lines.append(f"{key} has no effect: targets: original implies it; it counts with targets: compressed_prefix")
        if self.reference_samples is not None and (self.block_tuning is not None or self.targets != "original"):
            reason = (
                "targets: compressed_prefix follows no original" if self.targets != "original" else "block tuning needs all"
            )
            lines.append(f"{prefix}reference_samples has no effect: {reason}")
        return tuple(lines)

    def memory_remedies(self) -> tuple[str, ...]:
        """Overrides that need less memory, those that leave the result as it is first."""
        tuning = self.block_tuning
        remedies = [
            ("offload_activations=true", not self.offload_activations),
            ("block_tuning.micro_batch_size=1", tuning is not None and tuning.micro_batch_size != 1),
            ("block_tuning.use_checkpointing=true", tuning is not None and not tuning.use_checkpointing),
            ("dtype=float16", self.dtype != "float16"),
            (f"model_seqlen={self.sequence_length // 2}", self.sequence_length > 3),
        ]
        return tuple(override for override, helps in remedies if helps)
