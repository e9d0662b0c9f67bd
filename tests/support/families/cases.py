"""Tiny models of the families beyond Llama's close kin; what decides how they compute is away from its default."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig

from tests.support.byte_model import VOCABULARY
from tests.support.models import save_random

_WINDOWS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_MULTIPLIERS = {
    "residual_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}
_FALCON = {"ffn_hidden_size": 64, "initializer_range": 0.15}
_OPT = {"ffn_dim": 64, "init_std": 0.15, "word_embed_proj_dim": 32}
_NEOX = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}

_OF_ONE_HEAD_SIZE = ("falcon", "opt", "gpt_neox")  # whose heads divide the hidden size, each with keys of its own

# A name for each case -> its model type and what it has in config.json, of lists the first entries.
CASES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 20, **_WINDOWS},
    ),
    "gemma3_text": ("gemma3_text", {"query_pre_attn_scalar": 20, **_WINDOWS}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 6, "pad_token_id": 0}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {**_MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.3, **_WINDOWS}),
    "falcon": ("falcon", {"bias": True, **_FALCON}),
    "falcon-one-by-one": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True, **_FALCON},
    ),
    "falcon-two-norms": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **_FALCON}),
    "falcon-one-norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, **_FALCON},
    ),
    "opt": ("opt", dict(_OPT)),
    "opt-norms-behind": ("opt", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-plain-norms": (
        "opt",
        {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
    "opt-gelu": ("opt", {**_OPT, "activation_function": "gelu"}),
    "opt-gelu-norms-behind": ("opt", {**_OPT, "activation_function": "gelu", "do_layer_norm_before": False}),
    "gpt_neox": ("gpt_neox", dict(_NEOX)),
    "gpt_neox-one-by-one": ("gpt_neox", {**_NEOX, "use_parallel_residual": False}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": True, "pad_token_id": 0, **_WINDOWS}),
}

# Of the second block of Qwen's, the MLP is a plain one.
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
MIXTURES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen2_moe": ("qwen2_moe", {**_SPARSE, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**_SPARSE, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}),
}


def save_case(folder: Path, case: str, *, blocks: int = 2, **changes: object) -> Path:
    """The model of a case, in float32, with weights that are large enough to make tokens differ."""
    model_type, settings = {**CASES, **MIXTURES}[case]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
    }
    if model_type not in _OF_ONE_HEAD_SIZE:
        sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if model_type not in ("opt", "falcon"):
        sizes |= {"intermediate_size": 64}
    cycled = {key: (blocks * settings[key])[:blocks] for key in ("layer_types", "no_rope_layers") if key in settings}
    return save_random(folder, AutoConfig.for_model(model_type, **{**sizes, **settings, **cycled, **changes}))
