"""What the project knows of a model family: where its blocks are, which linears are compressed and which share an input.

A family is data, a row of :mod:`algorithms.modeling.families.table`; no code branches on a model's type. Paths of linears are
relative to the block, in the order in which the block computes them. ``*`` stands for the number of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # recipes are checked without torch, and name what is here
    from torch import nn

LLAMA_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LLAMA_NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
LLAMA_GATES = {"mlp.down_proj": "mlp.gate_proj"}
LLAMA_FEEDERS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
_EXPERT = "*"


@dataclass(frozen=True, kw_only=True)
class ModelArchitecture:
    """One row: module paths of a family's causal LM.

    ``input_groups`` are the linears of one block that are compressed; those in the same tuple read the same input. All else in
    a block stays: norms, routers, and linears that are not listed. A block need not have all of them: see :meth:`groups_in`.
    ``head`` is the output projection, which stays uncompressed (and may be tied to the embeddings). The outputs of
    ``residual_writers`` are added to the residual stream as they are, or times the number that a block has under the name
    ``residual_multiplier``.

    Where a factor for each input channel of a group can be moved, by the group's first linear: ``input_norms`` have the norm
    whose output the group reads, ``feeders`` the linear whose output rows become its input channels through nothing but
    products with other values, or ReLU. Where an attention head's values serve several query heads, one row feeds several
    channels; where the products are with the outputs of a further linear, row by row, that is in ``gates``. A linear in
    ``fused`` holds several, one below the other; of such a feeder, the last are the rows meant, of such a gate the first.
    Norms multiply by their weight plus ``norm_offset``. ``attention`` is the module that holds queries, keys and values, in
    ``qkv`` their linears (three times the same where it is fused, none where the family mixes their rows); ``qk_norms`` are
    norms of each head's queries and keys, behind their linears; with ``norms_all_heads``, such norms are over all heads.

    ``experts`` is the module of a block's mixture whose children are experts. ``stored_names`` are pairs of a part of a
    tensor's name in files of the family, and what the model has there. A row counts for models whose config.json has the
    values ``when``. ``is_inspected`` marks a row that is in no table (:mod:`algorithms.modeling.families.inspection`).
    """

    model_type: str
    when: Mapping[str, object] = field(default_factory=dict)
    blocks: str = "model.layers"
    head: str = "lm_head"
    input_groups: tuple[tuple[str, ...], ...] = LLAMA_GROUPS
    residual_writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    residual_multiplier: str | None = None
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    input_norms: Mapping[str, str] = field(default_factory=lambda: dict(LLAMA_NORMS))
    feeders: Mapping[str, str] = field(default_factory=lambda: dict(LLAMA_FEEDERS))
    gates: Mapping[str, str] = field(default_factory=lambda: dict(LLAMA_GATES))
    fused: tuple[str, ...] = ()
    norm_offset: float = 0.0
    attention: str = "self_attn"
    qkv: tuple[str, str, str] | None = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qk_norms: tuple[str, str] | None = None
    norms_all_heads: bool = False
    experts: str | None = None
    stored_names: tuple[tuple[str, str], ...] = ()
    is_inspected: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Every compressed linear of a block, in the order of computation."""
        return tuple(path for group in self.input_groups for path in group)

    def groups_in(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """The input groups of one block: in some families not all blocks are alike."""
        return tuple(_present(self.input_groups, {name for name, _ in block.named_modules()}))

    def resolved(self, blocks: Iterable[nn.Module]) -> ModelArchitecture:
        """The row with every expert by its number, and only with linears that one of a model's blocks has."""
        if self.experts is None:
            return self
        blocks = list(blocks)
        names = {name for block in blocks for name, _ in block.named_modules()}
        prefix = f"{self.experts}."
        numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        count = sum(number.isdecimal() for number in numbers)
        return replace(
            self,
            input_groups=tuple(_present(_expanded_groups(self.input_groups, count), names)),
            input_norms=_expanded(self.input_norms, count),
            feeders=_expanded(self.feeders, count),
            gates=_expanded(self.gates, count),
        )

    def is_expert(self, name: str) -> bool:
        """Whether a linear belongs to an expert, which sees only the tokens that are routed to it."""
        return self.experts is not None and name.startswith(f"{self.experts}.")


def _present(groups: Iterable[Sequence[str]], names: set[str]) -> Iterator[tuple[str, ...]]:
    for group in groups:
        there = tuple(name for name in group if name in names)
        if there:
            yield there


def _expanded_groups(groups: Sequence[tuple[str, ...]], count: int) -> Iterator[tuple[str, ...]]:
    """Groups for every expert: all of the first expert, then all of the second, as they compute."""
    for is_pattern, run in groupby(groups, lambda group: _EXPERT in group[0]):
        if not is_pattern:
            yield from run
            continue
        patterns = list(run)
        for number in range(count):
            yield from (tuple(name.replace(_EXPERT, str(number)) for name in pattern) for pattern in patterns)


def _expanded(places: Mapping[str, str], count: int) -> dict[str, str]:
    """Paths by path, for every expert."""
    return {
        name.replace(_EXPERT, str(number)): other.replace(_EXPERT, str(number))
        for name, other in places.items()
        for number in range(count if _EXPERT in name else 1)
    }
