"""A model as a server with quantized activations and a quantized cache computes it, simulated in float32.

Inputs of linears are quantized in forward pre-hooks. Keys and values are quantized where attention takes them, behind the
rotary embedding: transformers looks attention up by the name in a module's ``config``, so each attention module gets a
configuration of its own with the name of the function below, which hands on to the implementation that was there before.
The model's own configuration, by which masks are made, keeps that implementation's name: masks are the ones it expects.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.numerics.activations.rounding import fake_quantize_cache, fake_quantize_static, fake_quantize_tokens
from algorithms.numerics.uniform import stored_scales

_NAME = "bitpress-served"
_BITS_A_BYTE = 8
_ALL_HEADS = -1


@dataclass(frozen=True, kw_only=True)
class CacheQuantization:
    """How a cache holds its tokens: see :func:`algorithms.numerics.activations.rounding.fake_quantize_cache`.

    A ``group_size`` of -1 is a token's whole projection, all heads together. With ``ranges``, the largest query, key and value
    of a text, grids are symmetric and known beforehand instead. ``queries`` are not cached; some recipes quantize them like
    ``keys`` and ``values`` all the same.
    """

    bits: int
    symmetric: bool = False
    group_size: int = 128
    whole_zeros: bool = True
    keys: bool = True
    values: bool = True
    queries: bool = False
    ranges: tuple[float, float, float] | None = None

    def quantize(self, states: Tensor) -> Tensor:
        """States [batch, heads, length, head_dim] as they come out of a cache whose grids follow them."""
        if self.group_size != _ALL_HEADS:
            return fake_quantize_cache(
                states, self.bits, self.group_size, symmetric=self.symmetric, whole_zeros=self.whole_zeros
            )
        batch, heads, length, width = states.shape
        tokens = states.transpose(1, 2).reshape(batch, length, heads * width)
        held = fake_quantize_cache(tokens, self.bits, heads * width, symmetric=self.symmetric, whole_zeros=self.whole_zeros)
        return held.view(batch, length, heads, width).transpose(1, 2)

    def held(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three as attention gets them."""
        quantizers = [self.quantize] * 3 if self.ranges is None else [self._static(largest) for largest in self.ranges]
        chosen = (self.queries, self.keys, self.values)
        states = zip((query, key, value), quantizers, chosen, strict=True)
        first, second, third = (quantize(tensor) if asked else tensor for tensor, quantize, asked in states)
        return first, second, third

    def _static(self, largest: float) -> Callable[[Tensor], Tensor]:
        scale = stored_scales(torch.tensor(largest / ((1 << (self.bits - 1)) - 1)))
        return lambda states: fake_quantize_static(states, scale.to(states.device), self.bits)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Activations of ``activation_bits``, dynamic for each token, and a quantized ``cache``; None leaves either as it is."""

    activation_bits: int | None = None
    cache: CacheQuantization | None = None

    def apply(self, module: nn.Module, linears: Sequence[str], architecture: ModelArchitecture) -> None:
        """Let a block, or all blocks of a model, compute what is served; applied again, the latest settings hold.

        Nothing that the module shares with others is changed, and copies of it behave alike.

        Args:
            module: a block or a whole model.
            linears: those whose inputs are quantized, by their paths in a block.
            architecture: where blocks and attention are.

        Raises:
            ValueError: see :meth:`check`; or an attention implementation that cannot be found.
        """
        for block in _blocks(module, architecture):
            there = dict(block.named_modules())  # not all blocks of a model have the same linears
            for name in linears:
                if name in there:
                    self.hook(there[name])
            self._serve_attention(block.get_submodule(architecture.attention))

    def hook(self, linear: nn.Module) -> None:
        """Quantize the inputs of one module, for instance of one that takes a linear's place; once, however often called."""
        is_hooked = "served_bits" in vars(linear)
        if self.activation_bits is None and not is_hooked:
            return
        linear.served_bits = self.activation_bits  # type: ignore[assignment]
        if not is_hooked:
            linear.register_forward_pre_hook(_quantize_inputs)

    def check(self, config: PretrainedConfig) -> None:
        """Whether a model can be served like this.

        Raises:
            ValueError: codes of the cache do not fill whole bytes.
        """
        if self.cache is None or _BITS_A_BYTE % self.cache.bits:
            return
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        together = _BITS_A_BYTE // self.cache.bits
        if head_dim % together:
            raise ValueError(
                f"a cache of {self.cache.bits} bits keeps {together} values in a byte, and a head has {head_dim}: "
                "choose 8 bits for keys and values."
            )

    def _serve_attention(self, attention: nn.Module) -> None:
        served = vars(attention).get("served")
        if self.cache is None and served is None:
            return
        self.check(attention.config)
        if served is None:
            implementation = attention.config._attn_implementation
            attention_implementation(attention, implementation)
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = _NAME
        else:
            implementation = served.implementation
        attention.served = _Served(cache=self.cache, implementation=implementation)


AS_IT_IS = Serving()


@dataclass(frozen=True, kw_only=True)
class _Served:
    """What an attention module is to do: the cache, and the name of the implementation that computes."""

    cache: CacheQuantization | None
    implementation: str | None


def _quantize_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if module.served_bits is None:
        return args
    return (fake_quantize_tokens(args[0], module.served_bits), *args[1:])


def _served_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: object
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries, keys and values [batch, heads, length, head_dim]; of quantized ones, where the cache says so."""
    cache = module.served.cache
    if cache is not None:
        query, key, value = cache.held(query, key, value)
    compute = attention_implementation(module, module.served.implementation)
    return compute(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(_NAME, _served_attention)


def attention_implementation(attention: nn.Module, name: str | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A registered implementation, or the plain one, which every family defines beside its attention."""
    if name in (None, "eager"):
        found = vars(sys.modules[type(attention).__module__]).get("eager_attention_forward")
    else:
        found = AttentionInterface().get(name)
    if found is None:
        raise ValueError(f"{type(attention).__name__}: attn_implementation {name!r} cannot be found; set another, as sdpa.")
    return found


def _blocks(module: nn.Module, architecture: ModelArchitecture) -> list[nn.Module]:
    """The blocks of a model; a block is the one it has."""
    listed = dict(module.named_modules()).get(architecture.blocks)
    return [module] if listed is None else list(listed.children())
