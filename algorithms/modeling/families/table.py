"""The architecture table: one row, or one for each of its variants, for every model family that the project knows."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from algorithms.modeling.architecture import LLAMA_FEEDERS, LLAMA_GATES, LLAMA_GROUPS, LLAMA_NORMS, ModelArchitecture
from algorithms.modeling.families.dense import DENSE_ROWS

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_ATTENTION_GROUPS, _MLP_GROUPS = LLAMA_GROUPS[:2], LLAMA_GROUPS[2:]
_EXPERT_GROUPS = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))
_SHARED_GROUPS = (("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), ("mlp.shared_expert.down_proj",))

# A mixture's router reads the norm before the experts, and each expert has statistics of its own: no factors go there. What an
# expert gives is weighted before it is added, so that the attention alone writes to the residual stream as it is.
_EXPERT_GATES = {"mlp.experts.*.down_proj": "mlp.experts.*.gate_proj"}
_EXPERT_FEEDERS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.experts.*.down_proj": "mlp.experts.*.up_proj"}
_SHARED_GATES = {"mlp.shared_expert.down_proj": "mlp.shared_expert.gate_proj"}
_SHARED_FEEDERS = {"mlp.shared_expert.down_proj": "mlp.shared_expert.up_proj"}


def _without(places: Mapping[str, str], leader: str) -> dict[str, str]:
    return {name: place for name, place in places.items() if name != leader}


def _mixture(model_type: str, **changes: object) -> ModelArchitecture:
    """A row like Mixtral's."""
    fields: dict[str, object] = {
        "input_groups": (*_ATTENTION_GROUPS, *_EXPERT_GROUPS),
        "residual_writers": ("self_attn.o_proj",),
        "input_norms": {"self_attn.q_proj": "input_layernorm"},
        "feeders": _EXPERT_FEEDERS,
        "gates": _EXPERT_GATES,
        "experts": "mlp.experts",
    }
    return ModelArchitecture(model_type=model_type, **{**fields, **changes})  # type: ignore[arg-type]


ROWS = (
    ModelArchitecture(model_type="llama"),
    ModelArchitecture(model_type="mistral"),
    ModelArchitecture(model_type="qwen2"),
    ModelArchitecture(model_type="qwen3", qk_norms=_QK_NORMS),
    ModelArchitecture(model_type="gemma", norm_offset=1.0),
    *DENSE_ROWS,
    _mixture(
        "mixtral",
        stored_names=(
            (".block_sparse_moe.", ".mlp."),
            (".w1.", ".gate_proj."),
            (".w3.", ".up_proj."),
            (".w2.", ".down_proj."),
        ),
    ),
    _mixture(
        "qwen2_moe",
        # Blocks of mlp_only_layers, and those between two of decoder_sparse_step, have one plain MLP.
        input_groups=(*_ATTENTION_GROUPS, *_MLP_GROUPS, *_SHARED_GROUPS, *_EXPERT_GROUPS),
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        input_norms=dict(LLAMA_NORMS),
        feeders={**LLAMA_FEEDERS, **_EXPERT_FEEDERS, **_SHARED_FEEDERS},
        gates={**LLAMA_GATES, **_EXPERT_GATES, **_SHARED_GATES},
    ),
    _mixture(
        "qwen3_moe",
        input_groups=(*_ATTENTION_GROUPS, *_MLP_GROUPS, *_EXPERT_GROUPS),
        residual_writers=("self_attn.o_proj", "mlp.down_proj"),
        input_norms=dict(LLAMA_NORMS),
        feeders={**LLAMA_FEEDERS, **_EXPERT_FEEDERS},
        gates={**LLAMA_GATES, **_EXPERT_GATES},
        qk_norms=_QK_NORMS,
    ),
    _mixture("olmoe", when={"clip_qkv": None}, norms_all_heads=True),
    # Values beyond clip_qkv are cut off: factors do not pass them.
    _mixture("olmoe", norms_all_heads=True, feeders=_without(_EXPERT_FEEDERS, "self_attn.o_proj")),
)


def is_known(model_type: str) -> bool:
    """Whether the table has a row for a ``model_type``."""
    return any(row.model_type == model_type for row in ROWS)


def known_families() -> tuple[str, ...]:
    """Every ``model_type`` of the table, in its order."""
    return tuple(dict.fromkeys(row.model_type for row in ROWS))


def architecture_for(model_type: str, config: PretrainedConfig | None = None) -> ModelArchitecture:
    """The row of a ``model_type`` as config.json spells it; the variant that ``config`` describes, or the family's first.

    Raises:
        ValueError: a family that is not in the table; the message lists those that are.
    """
    rows = [row for row in ROWS if row.model_type == model_type]
    if not rows:
        raise ValueError(
            f"MODEL: model_type {model_type!r} is not in the architecture table (known: {', '.join(known_families())}). "
            "Add a row to algorithms/modeling/families/table.py if its blocks follow the same plan."
        )
    fitting = (row for row in rows if all(getattr(config, key, None) == value for key, value in row.when.items()))
    return rows[0] if config is None else next(fitting, rows[0])
