"""Which configuration of transformers' own can hold a pruned model, with the biases that pruning has added.

Llama, Mistral and Qwen2 compute the same but for the biases that they have and for sliding windows, and so does Seed-OSS. A
model of the first three whose windows never end is written as whichever of them holds its biases and its number of heads.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from algorithms.formats.pruned.structure import Structure
from algorithms.modeling.source import ModelError, ModelSource

_QUERIES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (*_QUERIES, "self_attn.o_proj")
_NEURONS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

# What one of these families needs of another's configuration. Written out in full, since their defaults differ.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)
_LEGACY = ("rope_scaling", "transformers_version")  # kept where the original has them; releases before 5 read the first


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A family's configuration: its flags with the linears that each gives a bias, and those that always have one.

    ``heads_divide_hidden``: it refuses a number of query heads that does not divide the hidden size. With
    ``counts_heads_in_rope``, long rotary factors have to be as many as the hidden size over the number of heads asks for.
    ``settings`` are what it needs to compute as the others do.
    """

    model_type: str
    causal_lm: str
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    always: tuple[str, ...] = ()
    heads_divide_hidden: bool = False
    counts_heads_in_rope: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def linears(self) -> frozenset[str]:
        """The linears that can have a bias."""
        return frozenset(self.always).union(*self.flags.values())

    def holds(self, structure: Structure, hidden_size: int) -> bool:
        """Whether there is a configuration for the largest block of a structure, and its biases."""
        size = structure.largest
        divides = hidden_size % (size.groups * size.heads_a_group) == 0
        return structure.biases <= self.linears and (divides or not self.heads_divide_hidden)

    def flags_for(self, biases: Collection[str]) -> dict[str, bool]:
        """Every flag: set where one of the linears it stands for has a bias."""
        return {flag: not set(linears).isdisjoint(biases) for flag, linears in self.flags.items()}

    def biases_for(self, biases: Collection[str]) -> frozenset[str]:
        """The linears that have a bias under those flags."""
        chosen = self.flags_for(biases)
        return frozenset(self.always).union(*(linears for flag, linears in self.flags.items() if chosen[flag]))


_STOCKS = {
    stock.model_type: stock
    for stock in (
        Stock(
            model_type="llama",
            causal_lm="LlamaForCausalLM",
            flags={"attention_bias": _ATTENTION, "mlp_bias": _NEURONS},
            heads_divide_hidden=True,
        ),
        Stock(model_type="mistral", causal_lm="MistralForCausalLM", settings={"sliding_window": None}),
        Stock(model_type="qwen2", causal_lm="Qwen2ForCausalLM", always=_QUERIES),
        Stock(model_type="qwen3", causal_lm="Qwen3ForCausalLM", flags={"attention_bias": _ATTENTION}),
        Stock(model_type="gemma", causal_lm="GemmaForCausalLM", flags={"attention_bias": _ATTENTION}),
        Stock(model_type="gemma2", causal_lm="Gemma2ForCausalLM", flags={"attention_bias": _ATTENTION}),
        Stock(model_type="gemma3_text", causal_lm="Gemma3ForCausalLM", flags={"attention_bias": _ATTENTION}),
        Stock(model_type="phi3", causal_lm="Phi3ForCausalLM", counts_heads_in_rope=True),
        Stock(model_type="olmo2", causal_lm="Olmo2ForCausalLM", flags={"attention_bias": _ATTENTION}),
        Stock(
            model_type="granite",
            causal_lm="GraniteForCausalLM",
            flags={"attention_bias": _ATTENTION, "mlp_bias": _NEURONS},
        ),
        Stock(model_type="cohere2", causal_lm="Cohere2ForCausalLM", flags={"attention_bias": _ATTENTION}),
        Stock(
            model_type="smollm3",
            causal_lm="SmolLM3ForCausalLM",
            flags={"attention_bias": _ATTENTION, "mlp_bias": _NEURONS},
        ),
        Stock(
            model_type="seed_oss",
            causal_lm="SeedOssForCausalLM",
            flags={"attention_bias": _QUERIES, "attention_out_bias": ("self_attn.o_proj",), "mlp_bias": _NEURONS},
            settings={"residual_dropout": 0.0},
        ),
    )
}
# The order of preference after the model's own family: servers know Llama best.
_ALIKE = ("llama", "mistral", "seed_oss")
_LIKE_LLAMA = {"llama", "mistral", "qwen2"}


def expressible_biases(config: PretrainedConfig) -> frozenset[str]:
    """The linears, relative to a block, that can have a bias where a model of this kind is written for stock loaders."""
    return frozenset().union(*(stock.linears for stock in _candidates(config)))


def family_refusal(config: PretrainedConfig) -> str | None:
    """Why no stock configuration can hold a narrower model of this kind, in a sentence; None where one can."""
    stock = _STOCKS.get(config.model_type)
    if stock is not None and stock.counts_heads_in_rope and "short_factor" in (config.rope_parameters or {}):
        return f"a {config.model_type} configuration with longrope has factors for as many heads as the original has."
    if stock is not None:
        return None
    return f"narrower models are written for {', '.join(_STOCKS)}, and this one is {config.model_type}."


def bias_refusal(config: PretrainedConfig, linears: Collection[str]) -> str | None:
    """Why stock loaders cannot read biases of these linears of a block, in a sentence; None where they can."""
    homeless = sorted(set(linears) - expressible_biases(config))
    if not homeless:
        return None
    reason = f"a {config.model_type} configuration has no place for biases of {', '.join(homeless)}"
    if config.model_type in _LIKE_LLAMA and _has_window(config):
        reason += f", and a sliding window of {config.sliding_window} tokens keeps it from being written as a llama, which has"
    return f"{reason}."


def stock_config(source: ModelSource, structure: Structure) -> tuple[dict[str, object], frozenset[str]]:
    """config.json of the original with the widths of the largest block, and the linears that have a bias under it.

    Raises:
        ModelError: biases that no such configuration has.
    """
    config, size = source.config, structure.largest
    reason = bias_refusal(config, structure.biases)
    if reason is not None:
        raise ModelError(f"{source.name} cannot be written for stock loaders: {reason}")
    stock = next(stock for stock in _candidates(config) if stock.holds(structure, config.hidden_size))
    settings = source.raw_config() if stock.model_type == config.model_type else _translated(source, stock)
    settings.pop("auto_map", None)
    settings |= {
        "num_attention_heads": size.groups * size.heads_a_group,
        "num_key_value_heads": size.groups,
        "head_dim": size.head_dim,
        "intermediate_size": size.neurons,
        **stock.flags_for(structure.biases),
    }
    return settings, stock.biases_for(structure.biases)


def _candidates(config: PretrainedConfig) -> tuple[Stock, ...]:
    """The model's own family, then those that compute the same."""
    own = config.model_type
    others = _ALIKE if own in _LIKE_LLAMA and not _has_window(config) else ()
    return tuple(_STOCKS[name] for name in dict.fromkeys((own, *others)))


def _has_window(config: PretrainedConfig) -> bool:
    """Whether a token in reach of the position embeddings can lie outside a sliding window."""
    window, layer_types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = layer_types is None or "sliding_attention" in layer_types
    return slides and window is not None and window < config.max_position_embeddings


def _translated(source: ModelSource, stock: Stock) -> dict[str, object]:
    """The original's config.json in another family's terms."""
    config, raw = source.config, source.raw_config()
    return {
        "architectures": [stock.causal_lm],
        "model_type": stock.model_type,
        **{name: getattr(config, name) for name in _SHARED},
        "rope_theta": config.rope_parameters["rope_theta"],  # releases before 5 look for it here
        **{name: raw[name] for name in _LEGACY if name in raw},
        **stock.settings,
    }
