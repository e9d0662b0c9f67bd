"""Tiny mixtures of experts of every family in the architecture table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig

from tests.support.byte_model import VOCABULARY
from tests.support.models import save_random

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

MIXTURES: Mapping[str, Mapping[str, object]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],  # a block with one plain MLP
    },
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 32, "norm_topk_prob": False, "decoder_sparse_step": 1},
    "olmoe": {**_EXPERTS, "eos_token_id": 2},
}


def save_mixture(folder: Path, model_type: str, *, blocks: int = 2, **changes: object) -> Path:
    """A mixture with four experts a block, two for each token, in float32, with weights that make tokens differ."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    return save_random(folder, AutoConfig.for_model(model_type, **{**sizes, **MIXTURES[model_type], **changes}))
