"""What attention is given in a block, and factors between queries and keys (SmoothAttention, QServe section 4.2).

A score is the product of a query and a key: with a factor f for each channel, (q f) (k / f) is the same. Keys of even size are
easier to hold in few bits. The rotary embedding turns channel j with channel j + d / 2, so both have the same factor; a factor
then goes through it. Legend: H query heads, K heads of keys and values, d channels a head, n tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.transforms.serving import attention_implementation
from algorithms.parallel.ranks import ALONE, Ranks

_NAME = "bitpress-observed"
_SAMPLED = 512  # tokens of all ranks that a sample has

Observer = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class AttentionStatistics:
    """Queries and keys behind the rotary embedding, and values, over the tokens of all ranks.

    ``largest_query`` [H, d], ``largest_key`` and ``largest_value`` [K, d] are largest sizes; ``queries`` [H, n, d] and ``keys``
    [K, n, d] those of some tokens at even distances.
    """

    largest_query: Tensor
    largest_key: Tensor
    largest_value: Tensor
    queries: Tensor
    keys: Tensor

    @property
    def largest(self) -> tuple[float, float, float]:
        """The largest query, key and value of all heads."""
        query, key, value = (sizes.max().item() for sizes in (self.largest_query, self.largest_key, self.largest_value))
        return query, key, value

    def smoothed(self, factors: Tensor) -> AttentionStatistics:
        """What :func:`smooth_keys` by ``factors`` [K, d] makes of queries and keys."""
        repeated = factors.repeat_interleave(self.largest_query.shape[0] // factors.shape[0], 0)
        return replace(
            self,
            largest_query=self.largest_query * repeated,
            largest_key=self.largest_key / factors,
            queries=self.queries * repeated[:, None],
            keys=self.keys / factors[:, None],
        )


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Products of queries [H, n, d] with keys [K, m, d], each key head's with those of its query heads, [K, H / K, n, m]."""
    return torch.einsum("khnd,kmd->khnm", queries.view(keys.shape[0], -1, *queries.shape[1:]), keys)


def attention_survey(
    block: nn.Module, index: int, inputs: Activations, architecture: ModelArchitecture, ranks: Ranks = ALONE
) -> AttentionStatistics:
    """Run the block over ``inputs`` and look at its attention; the block stays as it is.

    Infinite and NaN numbers count as nothing, and their tokens are no part of the samples.
    """
    largest: list[Tensor] = []
    samples: list[tuple[Tensor, Tensor]] = []
    count = -(-_SAMPLED // max(1, len(inputs.batches) * ranks.size))

    def _see(*states: Tensor) -> None:
        sizes = [torch.where(torch.isfinite(state), state.abs(), 0).amax((0, 2)) for state in states]
        largest[:] = [torch.maximum(old, new) for old, new in zip(largest, sizes, strict=True)] if largest else sizes
        tokens = [state.transpose(0, 1).flatten(1, 2) for state in states[:2]]  # [heads, tokens, d]
        finite = torch.stack([torch.isfinite(state.sum((0, 2))) for state in tokens]).all(0)
        tokens = [state[:, finite] for state in tokens]
        step = max(1, tokens[0].shape[1] // count)
        samples.append((tokens[0][:, ::step][:, :count], tokens[1][:, ::step][:, :count]))

    with torch.no_grad(), observed(block, architecture, _see):
        for batch in inputs:
            inputs.arguments.run(block, index, batch)
    own = (largest, [torch.cat(part, 1) for part in zip(*samples, strict=True)]) if largest else None
    parts = [part for part in ranks.exchange(own) if part is not None]
    query, key, value = (torch.stack(sizes).amax(0) for sizes in zip(*(part[0] for part in parts), strict=True))
    queries, keys = (torch.cat(part, 1) for part in zip(*(part[1] for part in parts), strict=True))
    return AttentionStatistics(largest_query=query, largest_key=key, largest_value=value, queries=queries, keys=keys)


@contextmanager
def observed(block: nn.Module, architecture: ModelArchitecture, see: Observer) -> Iterator[None]:
    """Within, ``see`` is handed the queries, keys and values [batch, heads, length, d] that attention takes in a forward."""
    attention = block.get_submodule(architecture.attention)
    before = attention.config
    implementation = before._attn_implementation
    attention_implementation(attention, implementation)
    attention.config = copy.copy(before)
    attention.config._attn_implementation = _NAME
    attention.observer = (see, implementation)
    try:
        yield
    finally:
        attention.config = before
        del attention.observer


def _observed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: object
) -> tuple[Tensor, Tensor | None]:
    see, implementation = module.observer
    see(query, key, value)
    return attention_implementation(module, implementation)(module, query, key, value, attention_mask, **settings)


AttentionInterface.register(_NAME, _observed_attention)


def of_pairs(sizes: Tensor) -> Tensor:
    """The larger of the two sizes of each rotary pair, [..., d], for both."""
    half = sizes.shape[-1] // 2
    return torch.maximum(sizes[..., :half], sizes[..., half:]).tile(2)


def of_key_heads(sizes: Tensor, count: int) -> Tensor:
    """The largest sizes [H, d] among the query heads of each of ``count`` key heads, [K, d]."""
    return sizes.view(count, -1, sizes.shape[-1]).amax(1)


@torch.no_grad()
def smooth_keys(block: nn.Module, architecture: ModelArchitecture, factors: Tensor) -> None:
    """Divide keys by ``factors`` [K, d] and multiply the queries that meet them: scores stay.

    Where norms follow the projections of queries and keys, they take the factors, which have to be equal in all heads. The
    factors of a rotary pair stay equal to the last bit: a gain that is rounded afterwards moves its channel alone.
    """
    if architecture.qk_norms is not None:
        query_norm, key_norm = (block.get_submodule(name) for name in architecture.qk_norms)
        query_norm.weight *= factors[0]
        key_norm.weight /= factors[0]
        return
    queries, keys, _ = (block.get_submodule(name) for name in architecture.qkv)
    heads, width = factors.shape
    repeats = queries.out_features // (heads * width)
    rows = factors.flatten()
    query_rows = factors.view(heads, 1, width).expand(-1, repeats, -1).flatten()
    for linear, factor in ((keys, 1 / rows), (queries, query_rows)):
        linear.weight *= factor[:, None]
        if linear.bias is not None:
            linear.bias *= factor
