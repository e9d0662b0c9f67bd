"""The parameters of FLAP as recipes spell them (``llm.FlapPruner``), with their ranges and their defaults. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from algorithms.blockwise.config import BlockwiseParameters
from algorithms.finetuning.adapt_keys import AdaptKeys
from configs.strict import Inert
from configs.values import (
    Choice,
    Count,
    Flag,
    NumberOrZero,
    Only,
    OptionalCount,
    Overwrite,
    Positive,
    Real,
    Whole,
    expected,
    inside,
)

STAGES = ("ranking", "pruning", "recovery", "conversion")
METRICS = Choice(("OBS", "IFV", "WIFV", "WIFN"))
NO_METRIC = "N/A"
MATCHED = ("UL-MM", "AL-MM")  # structures that are told how many heads to remove, and match neurons to that
# What each stage's result depends on, apart from the text; keys that a subclass or a later base adds shape neither.
_RANKING = ("metrics", "structure", "pruning_ratio", "remove_heads", "start_pruning_layer_idx", "dtype", "attn_implementation")
_PRUNING = ("compensation", "ridge", "reference_samples", "dtype", "attn_implementation")
_BOTH_SPELLINGS = "model_seqlen alone: seqlen is another spelling of it"
_ORIGINAL = "original: what is left of a block makes up for all that went before it, which takes the original's outputs"
_NO_TUNING = "null: pruned blocks are compensated for in closed form; to_finetune tunes the whole model afterwards"
_NO_EXPERTS = "null: mixtures of experts are not pruned"
_NO_OFFSET = (
    "false: nyuntam prunes as many blocks, but from the first one on, and ranks those by the statistics of others; here the "
    "blocks from start_pruning_layer_idx on are ranked and pruned"
)


def _metrics(value: object) -> str:
    """Reads a metric; nyuntam's N/A is among its choices but ends in an error there."""
    if value == NO_METRIC:
        raise expected(f"one of {', '.join(METRICS.names)} ({NO_METRIC} ranks nothing)")
    return METRICS(value)


class FlapConfig(AdaptKeys, BlockwiseParameters):
    """The block ``llm.FlapPruner``. Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`.

    ``pruning_ratio`` is the share of the parameters of the blocks from ``start_pruning_layer_idx`` on. ``gqa_groups``,
    ``head_dim`` and ``hidden_dim`` are null or what the model has.
    """

    algorithm: ClassVar[str] = "FlapPruner"
    stage_names: ClassVar[tuple[str, ...]] = STAGES
    export_formats: ClassVar[tuple[str, ...]] = ("padded", "ragged")
    inert: ClassVar[Mapping[str, Inert]] = {
        **AdaptKeys.inert,
        "eval": Inert(False, "name the texts under EVALUATION instead"),
        "save_model": Inert(None, "the result always goes to the job folder"),
    }
    spellings: ClassVar[Mapping[str, str]] = {"seqlen": "model_seqlen"}

    overwrite: Annotated[bool | tuple[str, ...], BeforeValidator(Overwrite(STAGES))] = False

    # the text
    num_samples: Count = Field(default=1024, alias="nsamples")
    sequence_length: Annotated[int, BeforeValidator(Whole(2))] = Field(default=128, alias="model_seqlen")

    # what goes
    metrics: Annotated[str, BeforeValidator(_metrics)] = "OBS"
    structure: Annotated[str, BeforeValidator(Choice(("UL-UM", "UL-MM", "AL-MM", "AL-AM")))] = "AL-AM"
    pruning_ratio: Annotated[float, BeforeValidator(Real(least=0.0, below=1.0))] = 0.2
    remove_heads: Annotated[int, BeforeValidator(Whole(-1))] = -1  # query heads of all pruned blocks together; -1: none given
    start_pruning_layer_idx: NumberOrZero = 0

    # what makes up for it
    compensation: Annotated[str, BeforeValidator(Choice(("least_squares", "bias", "none")))] = "least_squares"
    ridge: Positive = 0.01

    # padded: the largest number of neurons is rounded up to a multiple of this, for quantization in groups; 1: it stays
    pad_neurons_to: Count = 32

    # null, or what the model has
    gqa_groups: OptionalCount = None
    head_dim: OptionalCount = None
    hidden_dim: OptionalCount = None

    # accepted without effect
    eval: Flag = False
    save_model: object = None

    # refused unless they ask for nothing
    targets: Annotated[str, BeforeValidator(Only("original", _ORIGINAL))] = "original"
    block_tuning: Annotated[None, BeforeValidator(Only(None, _NO_TUNING))] = None
    min_expert_tokens: Annotated[None, BeforeValidator(Only(None, _NO_EXPERTS))] = None
    legacy_layer_offset: Annotated[bool, BeforeValidator(Only(False, _NO_OFFSET))] = False

    @model_validator(mode="before")
    @classmethod
    def _one_spelling_of_the_length(cls, values: object) -> object:
        if not isinstance(values, Mapping) or "seqlen" not in values:
            return values
        with inside(("seqlen",), values["seqlen"]):
            if "model_seqlen" in values or "sequence_length" in values:
                raise expected(_BOTH_SPELLINGS)
            length = Whole(2)(values["seqlen"])
        return {**{key: value for key, value in values.items() if key != "seqlen"}, "model_seqlen": length}

    @property
    def tells_heads(self) -> bool:
        """Whether ``remove_heads`` counts: the structure matches neurons to it, and the recipe gives it."""
        return self.structure in MATCHED and self.remove_heads >= 0

    @property
    def _idle(self) -> frozenset[str]:
        """Keys of the compensation that change nothing beside the others."""
        return frozenset() if self.compensation == "least_squares" else frozenset({"ridge", "reference_samples"})

    @property
    def ranking_shaping(self) -> Mapping[str, object]:
        """Every value that shapes which heads and neurons go, apart from the text."""
        return self._values(name for name in _RANKING if name != "remove_heads" or self.tells_heads)

    @property
    def pruning_shaping(self) -> Mapping[str, object]:
        """Every value that shapes the weights of a pruned block, apart from the text and from what goes."""
        return self._values(name for name in _PRUNING if name not in self._idle)

    @property
    def shaping(self) -> Mapping[str, object]:
        """The values of both stages."""
        return {**self.ranking_shaping, **self.pruning_shaping}

    def _values(self, names: Iterable[str]) -> dict[str, object]:
        return self.model_dump(mode="json", include=set(names))

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect, and of a default that is not nyuntam's."""
        lines, given = list(super().warnings(prefix)), self.model_fields_set
        if self.remove_heads >= 0 and not self.tells_heads:
            lines.append(f"{prefix}remove_heads has no effect: it counts with the structures {' and '.join(MATCHED)}")
        if self.validation_size:
            lines.append(f"{prefix}val_size has no effect: nothing is chosen by how it does on text that was held out")
        if "ridge" in given and self.compensation != "least_squares":
            lines.append(f"{prefix}ridge has no effect: compensation: {self.compensation} solves for nothing")
        return tuple(lines)

    def groups_to_remove(self, *, blocks: int, groups: int, heads_a_group: int) -> int:
        """How many groups of heads the structures with matched neurons remove, of all pruned blocks together.

        ``remove_heads``, in whole groups; where it is not given, ``pruning_ratio`` of the groups, so that heads and neurons
        give up the same share. A structure that treats all blocks alike (UL) removes as many of each. One group a block stays.

        Args:
            blocks: pruned blocks.
            groups: groups of heads that share keys and values, in each block.
            heads_a_group: query heads of a group.

        Raises:
            ValueError: ``remove_heads`` asks for more than there are to give.
        """
        wanted = self.remove_heads / heads_a_group if self.tells_heads else self.pruning_ratio * blocks * groups
        each = blocks if self.structure.startswith("UL") else 1
        removed, most = each * int(wanted / each + 0.5), blocks * (groups - 1)
        if self.tells_heads and removed > most:
            raise ValueError(
                f"remove_heads: {self.remove_heads} heads are to go; {blocks} blocks can give {most * heads_a_group}, for each "
                f"keeps {heads_a_group}, which share their keys and values."
            )
        return min(removed, most)
