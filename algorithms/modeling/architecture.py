"""The architecture table: where a model family keeps its blocks, and which of a block's linears share an input.

A family is one row of data; no code branches on a model's type. Paths in ``input_groups`` are relative to the block, in the
order in which the block computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_LLAMA_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_LLAMA_NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
_LLAMA_GATES = {"mlp.down_proj": "mlp.gate_proj"}
_LLAMA_FEEDERS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}


@dataclass(frozen=True, kw_only=True)
class ModelArchitecture:
    """One row: module paths of a family's causal LM.

    ``input_groups`` are the linears of one block that are compressed; those in the same tuple read the same input.
    ``head`` is the output projection, which stays uncompressed (and may be tied to the embeddings). The outputs of
    ``residual_writers`` are added to the residual stream as they are.

    Where a factor for each input channel of a group can be moved, by the group's first linear: ``input_norms`` have the norm
    whose output the group reads, ``feeders`` the linear whose output rows become its input channels through nothing but
    products with other values. Where an attention head's values serve several query heads, one row feeds several channels;
    where the products are with the outputs of a further linear, row by row, that is in ``gates``.
    Norms multiply by their weight plus ``norm_offset``. ``attention`` is the module that holds queries, keys and values, in
    ``qkv`` their linears; ``qk_norms`` are norms of each head's queries and keys, behind their linears.
    """

    model_type: str
    blocks: str = "model.layers"
    head: str = "lm_head"
    input_groups: tuple[tuple[str, ...], ...] = _LLAMA_GROUPS
    residual_writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    input_norms: Mapping[str, str] = field(default_factory=lambda: dict(_LLAMA_NORMS))
    feeders: Mapping[str, str] = field(default_factory=lambda: dict(_LLAMA_FEEDERS))
    gates: Mapping[str, str] = field(default_factory=lambda: dict(_LLAMA_GATES))
    norm_offset: float = 0.0
    attention: str = "self_attn"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qk_norms: tuple[str, str] | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Every compressed linear of a block, in the order of computation."""
        return tuple(path for group in self.input_groups for path in group)


_TABLE = {
    row.model_type: row
    for row in (
        ModelArchitecture(model_type="llama"),
        ModelArchitecture(model_type="mistral"),
        ModelArchitecture(model_type="qwen2"),
        ModelArchitecture(model_type="qwen3", qk_norms=("self_attn.q_norm", "self_attn.k_norm")),
        ModelArchitecture(model_type="gemma", norm_offset=1.0),
    )
}


def is_known(model_type: str) -> bool:
    """Whether the table has a row for a ``model_type``."""
    return model_type in _TABLE


def architecture_for(model_type: str) -> ModelArchitecture:
    """The row of a ``model_type`` as config.json spells it.

    Raises:
        ValueError: a family that is not in the table; the message lists those that are.
    """
    if model_type not in _TABLE:
        raise ValueError(
            f"MODEL: model_type {model_type!r} is not in the architecture table (known: {', '.join(_TABLE)}). "
            "Add a row to algorithms/modeling/architecture.py if its blocks follow the same plan."
        )
    return _TABLE[model_type]
