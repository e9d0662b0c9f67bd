"""Tiny models of families that the architecture table need not have, built from transformers' configurations."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tests.support.byte_model import VOCABULARY, save_tokenizer

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
CHANGES = {
    "starcoder2": {},
    "stablelm": {},
    "persimmon": {},
    "glm": {},
    "nemotron": {},
    "olmo": {},
    "helium": {},
    "exaone4": {},
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "deepseek_v3": {**_ROUTED, **_LATENT, "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4},
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def stranger_config(model_type: str) -> PretrainedConfig:
    """Two blocks, 32 wide; mixtures have four experts, and some a first block without."""
    settings = {**_COMMON, **CHANGES.get(model_type, {})}
    if model_type == "falcon":
        settings.pop("head_dim")  # follows from the others there
    return AutoConfig.for_model(model_type, **settings)


def stranger(model_type: str) -> PreTrainedModel:
    """Such a model with seeded random weights, float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(stranger_config(model_type), dtype=torch.float32).eval()


def save_stranger(folder: Path, model_type: str) -> Path:
    """Written to disk, with the byte tokenizer."""
    stranger(model_type).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
