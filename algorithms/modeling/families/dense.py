"""Rows of the architecture table: families in whose blocks every token passes the same linears, beyond Llama's close kin."""

from __future__ import annotations

from algorithms.modeling.architecture import LLAMA_GROUPS, ModelArchitecture

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def _gemma(model_type: str, **changes: object) -> ModelArchitecture:
    """A row like Gemma 2's: what attention and the MLP give goes through norms of its own before it is added."""
    fields: dict[str, object] = {
        "residual_writers": (),
        "input_norms": {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "pre_feedforward_layernorm"},
        "norm_offset": 1.0,
    }
    return ModelArchitecture(model_type=model_type, **{**fields, **changes})  # type: ignore[arg-type]


_PHI3 = ModelArchitecture(
    model_type="phi3",
    input_groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    input_norms={"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"},
    feeders={"self_attn.o_proj": "self_attn.qkv_proj", "mlp.down_proj": "mlp.gate_up_proj"},
    gates={"mlp.down_proj": "mlp.gate_up_proj"},
    fused=("self_attn.qkv_proj", "mlp.gate_up_proj"),
    qkv=("self_attn.qkv_proj",) * 3,
)

# Attention and MLP side by side, both on one norm.
_COHERE2 = ModelArchitecture(
    model_type="cohere2",
    input_groups=((*LLAMA_GROUPS[0], *LLAMA_GROUPS[2]), LLAMA_GROUPS[1], LLAMA_GROUPS[3]),
    input_norms={"self_attn.q_proj": "input_layernorm"},
)

_FALCON_QKV, _FALCON_OUT = "self_attention.query_key_value", "self_attention.dense"
_FOUR_UP, _FOUR_DOWN = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"


def _falcon(when: dict[str, object], norms: tuple[str, str] | None) -> ModelArchitecture:
    """A variant with norms before attention and before the MLP, or with one for both.

    Queries, keys and values of each group of heads stand together in one linear: nothing feeds the linear behind attention.
    """
    apart = ((_FALCON_QKV,), (_FALCON_OUT,), (_FOUR_UP,), (_FOUR_DOWN,))
    together = ((_FALCON_QKV, _FOUR_UP), (_FALCON_OUT,), (_FOUR_DOWN,))
    return ModelArchitecture(
        model_type="falcon",
        when=when,
        blocks="transformer.h",
        input_groups=together if norms is None else apart,
        residual_writers=(_FALCON_OUT, _FOUR_DOWN),
        embeddings="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        input_norms={_FALCON_QKV: "input_layernorm"} if norms is None else {_FALCON_QKV: norms[0], _FOUR_UP: norms[1]},
        feeders={},
        gates={},
        attention="self_attention",
        qkv=None,
    )


_FALCON = (
    _falcon({"new_decoder_architecture": False, "parallel_attn": True}, None),
    _falcon({"new_decoder_architecture": False}, ("input_layernorm", "post_attention_layernorm")),
    _falcon({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, None),
    _falcon({"new_decoder_architecture": True}, ("ln_attn", "ln_mlp")),
)


def _opt(when: dict[str, object], *, folds: bool = True, adds: bool = True) -> ModelArchitecture:
    """A variant: whether its norms take factors, and whether what attention and the MLP give is added as it is.

    A positive factor passes through ReLU: relu(x / s) = relu(x) / s. So the first linear of the MLP feeds the second.
    """
    is_relu = when.get("activation_function") == "relu"
    return ModelArchitecture(
        model_type="opt",
        when=when,
        blocks="model.decoder.layers",
        input_groups=(LLAMA_GROUPS[0], ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        residual_writers=("self_attn.out_proj", "fc2") if adds else (),
        embeddings="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        input_norms={"self_attn.q_proj": "self_attn_layer_norm", "fc1": "final_layer_norm"} if folds else {},
        feeders={"self_attn.out_proj": "self_attn.v_proj", **({"fc2": "fc1"} if is_relu else {})},
        gates={},
    )


# With do_layer_norm_before: false, what a norm makes is the residual stream itself, which takes no factors.
_OPT = (
    _opt({"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "activation_function": "relu"}),
    _opt({"do_layer_norm_before": True, "layer_norm_elementwise_affine": True}),
    _opt({"do_layer_norm_before": True}, folds=False),
    _opt({"activation_function": "relu"}, folds=False, adds=False),
    _opt({}, folds=False, adds=False),
)

# Side by side (use_parallel_residual) or one behind the other: both have a norm of their own, so that groups are the same.
_GPT_NEOX = ModelArchitecture(
    model_type="gpt_neox",
    stored_names=(("embed_out.", "lm_head."),),
    blocks="gpt_neox.layers",
    input_groups=(("attention.query_key_value",), ("attention.dense",), (_FOUR_UP,), (_FOUR_DOWN,)),
    residual_writers=("attention.dense", _FOUR_DOWN),
    embeddings="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    input_norms={"attention.query_key_value": "input_layernorm", _FOUR_UP: "post_attention_layernorm"},
    feeders={},
    gates={},
    attention="attention",
    qkv=None,
)

DENSE_ROWS = (
    _gemma("gemma2"),
    _gemma("gemma3_text", qk_norms=_QK_NORMS),
    _PHI3,
    # Its linears read the residual stream, and its norms of queries and keys are over all heads together.
    ModelArchitecture(model_type="olmo2", residual_writers=(), input_norms={}, norms_all_heads=True),
    ModelArchitecture(model_type="granite", residual_multiplier="residual_multiplier"),
    _COHERE2,
    *_FALCON,
    *_OPT,
    _GPT_NEOX,
    ModelArchitecture(model_type="smollm3"),
    ModelArchitecture(model_type="seed_oss"),
)
