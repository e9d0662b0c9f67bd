"""Causal language models whose layers have widths of their own, for transformers; written by Bitpress beside their weights.

Load with ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. A model is one of a family that transformers
knows, ``base_model_type``, but for its linears. How wide they are, the configuration says for each layer:
``num_attention_heads_per_layer``, ``num_key_value_heads_per_layer``, ``intermediate_size_per_layer``. ``biases`` names the
linears of a layer that have one. All else is the original model's.
"""

from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


class RaggedLlamaConfig(LlamaConfig):
    """Of a Llama."""

    model_type = "ragged_llama"


class RaggedMistralConfig(MistralConfig):
    """Of a Mistral."""

    model_type = "ragged_mistral"


class RaggedQwen2Config(Qwen2Config):
    """Of a Qwen2."""

    model_type = "ragged_qwen2"


class RaggedQwen3Config(Qwen3Config):
    """Of a Qwen3."""

    model_type = "ragged_qwen3"


class RaggedGemmaConfig(GemmaConfig):
    """Of a Gemma."""

    model_type = "ragged_gemma"


def take_widths(model: PreTrainedModel) -> None:
    """Give every layer's linears the widths and biases of the configuration."""
    config, hidden = model.config, model.config.hidden_size
    sizes = zip(
        config.num_attention_heads_per_layer,
        config.num_key_value_heads_per_layer,
        config.intermediate_size_per_layer,
        strict=True,
    )
    for layer, (heads, groups, neurons) in zip(model.model.layers, sizes, strict=True):
        queries, keys = heads * layer.self_attn.head_dim, groups * layer.self_attn.head_dim
        layer.self_attn.num_key_value_groups = heads // groups
        sides = {
            "self_attn.q_proj": (hidden, queries),
            "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys),
            "self_attn.o_proj": (queries, hidden),
            "mlp.gate_proj": (hidden, neurons),
            "mlp.up_proj": (hidden, neurons),
            "mlp.down_proj": (neurons, hidden),
        }
        for name, (inputs, outputs) in sides.items():
            layer.set_submodule(name, nn.Linear(inputs, outputs, bias=name in config.biases))


class RaggedLlamaForCausalLM(LlamaForCausalLM):
    """A Llama with widths for each layer."""

    config_class = RaggedLlamaConfig

    def __init__(self, config: RaggedLlamaConfig) -> None:
        super().__init__(config)
        take_widths(self)


class RaggedMistralForCausalLM(MistralForCausalLM):
    """A Mistral with widths for each layer."""

    config_class = RaggedMistralConfig

    def __init__(self, config: RaggedMistralConfig) -> None:
        super().__init__(config)
        take_widths(self)


class RaggedQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2 with widths for each layer."""

    config_class = RaggedQwen2Config

    def __init__(self, config: RaggedQwen2Config) -> None:
        super().__init__(config)
        take_widths(self)


class RaggedQwen3ForCausalLM(Qwen3ForCausalLM):
    """A Qwen3 with widths for each layer."""

    config_class = RaggedQwen3Config

    def __init__(self, config: RaggedQwen3Config) -> None:
        super().__init__(config)
        take_widths(self)


class RaggedGemmaForCausalLM(GemmaForCausalLM):
    """A Gemma with widths for each layer."""

    config_class = RaggedGemmaConfig

    def __init__(self, config: RaggedGemmaConfig) -> None:
        super().__init__(config)
        take_widths(self)
