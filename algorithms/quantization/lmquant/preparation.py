"""What QoQ does to a block before its weights are coded: another order of channels, smoothed inputs, smoothed keys.

Legend: I input channels of a group, O rows of its linears, K heads of keys, d channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from algorithms.blockwise.coded import FreshBlock
from algorithms.modeling.transforms.attention import (
    AttentionStatistics,
    attention_survey,
    of_key_heads,
    of_pairs,
    smooth_keys,
)
from algorithms.modeling.transforms.folding import can_fold, feeder_rows, fold, largest_shared
from algorithms.modeling.transforms.reorder import SEQUENTIAL, TRANSPOSE, Order, channel_order, reorder
from algorithms.modeling.transforms.serving import CacheQuantization
from algorithms.modeling.transforms.survey import ChannelStatistics, survey
from algorithms.numerics.activations.rounding import fake_quantize_tokens
from algorithms.numerics.codebooks.additive import quadratic_error
from algorithms.numerics.grids.channel_scales import some_rows
from algorithms.parallel.ranks import moved
from algorithms.quantization.lmquant.roles import role_of
from algorithms.quantization.lmquant.settings import Settings

CPU = torch.device("cpu")
_SMALLEST = 1e-5  # of a size whose power is taken

Rounded = Callable[[Tensor], Tensor]


class Preparation:
    """Changes a block in the order reorder, xw, yx; the rotation is the source's.

    Args:
        settings: of the recipe.
        rounded: W [O, I] as its codes would have it, by rounding to nearest.
        cache: how keys are held; None where they are not quantized.
    """

    def __init__(self, settings: Settings, rounded: Rounded, cache: CacheQuantization | None) -> None:
        self._settings, self._rounded, self._cache = settings, rounded, cache

    def prepare(self, fresh: FreshBlock) -> Mapping[str, object]:
        """Change the block; returns what was chosen, by the first linear of each group."""
        settings, report = self._settings, {}
        assert fresh.inputs is not None, "LMQuant looks at activations"
        if settings.reorder is not None or settings.smooth_xw is not None:
            found = survey(fresh.block, fresh.index, fresh.inputs, fresh.architecture, fresh.ranks)
            if settings.reorder is not None:
                report["reorder"] = self._reorder(fresh, found)
            if settings.smooth_xw is not None:
                report["smooth_xw"] = self._smooth_inputs(fresh, found)
        static = settings.cache is not None and settings.cache.static
        if settings.smooth_yx is not None or static:
            statistics = attention_survey(fresh.block, fresh.index, fresh.inputs, fresh.architecture, fresh.ranks)
            if settings.smooth_yx is not None:
                report["smooth_yx"], statistics = self._smooth_keys(fresh, statistics)
            if static:
                report["cache_ranges"] = _ranges(statistics)
        return report

    def _reorder(self, fresh: FreshBlock, found: dict[str, ChannelStatistics]) -> Mapping[str, str]:
        settings, weights = self._settings.reorder, self._settings.weights
        assert settings is not None
        chosen = {}
        for leader in fresh.architecture.feeders:
            if role_of(fresh.architecture, leader) in settings.skips:
                continue
            statistics, group_size = found[leader], weights.group_size if weights is not None else -1
            width = statistics.largest.shape[0]
            orders = {
                index: channel_order(
                    fresh.block,
                    fresh.architecture,
                    leader,
                    statistics.largest,
                    index=index,
                    group_size=width if group_size == -1 else group_size,
                )
                for index in ((SEQUENTIAL, TRANSPOSE) if settings.strategy == "GridSearch" else (settings.index,))
            }
            index = settings.index if settings.strategy != "GridSearch" else self._best_order(fresh, leader, statistics, orders)
            index, order = fresh.ranks.from_main((index, moved(orders.get(index), CPU)))
            chosen[leader] = index
            if order is not None:
                order = moved(order, statistics.largest.device)
                reorder(fresh.block, fresh.architecture, leader, order)
                found[leader] = _reordered(statistics, order)
        return chosen

    def _best_order(self, fresh: FreshBlock, leader: str, statistics: ChannelStatistics, orders: Mapping[str, Order]) -> str:
        """The order in which rounding costs least; ``as it is`` where none is better than the model's own."""
        matrix = some_rows(fresh.block.get_submodule(leader).weight)
        losses = {"as it is": quadratic_error(self._rounded(matrix) - matrix, statistics.hessian)}
        for index, order in orders.items():
            moved_matrix = matrix[:, order.channels]
            metric = statistics.hessian[order.channels][:, order.channels]
            losses[index] = quadratic_error(self._rounded(moved_matrix) - moved_matrix, metric)
        return min(losses, key=lambda index: losses[index])

    def _smooth_inputs(self, fresh: FreshBlock, found: Mapping[str, ChannelStatistics]) -> Mapping[str, object]:
        settings, architecture = self._settings.smooth_xw, fresh.architecture
        assert settings is not None
        chosen = {}
        for group in architecture.input_groups:
            leader = group[0]
            if role_of(architecture, leader) in settings.skips or not can_fold(architecture, leader):
                continue
            matrix = torch.cat([fresh.block.get_submodule(name).weight for name in group])
            inputs, weights = found[leader].largest, matrix.abs().amax(0)
            if leader in architecture.feeders:
                rows = feeder_rows(fresh.block, architecture, leader).to(matrix.device)
                inputs, weights = largest_shared(inputs, rows), largest_shared(weights, rows)
            pair = self._best_pair(settings.candidates, matrix, found[leader].sample, inputs, weights)
            scales, pair = fresh.ranks.from_main((moved(smoothing_factors(inputs, weights, *pair), CPU), pair))
            fold(fresh.block, architecture, leader, scales.to(matrix.device))
            chosen[leader] = {"alpha": pair[0], "beta": pair[1]}
        return chosen

    def _best_pair(
        self,
        candidates: Sequence[tuple[float, float]],
        matrix: Tensor,
        tokens: Tensor,
        inputs: Tensor,
        weights: Tensor,
    ) -> tuple[float, float]:
        """The exponents with which the products of rounded weights and rounded inputs are nearest to those of neither."""
        if len(candidates) == 1:
            return candidates[0]
        assert self._settings.smooth_xw is not None
        some, bits = some_rows(matrix), self._settings.inputs
        outputs = tokens @ some.T

        def _loss(pair: tuple[float, float]) -> float:
            factors = smoothing_factors(inputs, weights, *pair)
            states = tokens / factors
            if bits is not None:
                states = fake_quantize_tokens(states[None], bits.bits)[0]
            return _power(states @ self._rounded(some * factors).T - outputs, self._settings.smooth_xw.degree)

        return min(candidates, key=_loss)

    def _smooth_keys(
        self, fresh: FreshBlock, statistics: AttentionStatistics
    ) -> tuple[Mapping[str, float], AttentionStatistics]:
        settings = self._settings.smooth_yx
        assert settings is not None
        heads = statistics.largest_key.shape[0]
        keys = of_pairs(statistics.largest_key)
        queries = of_pairs(of_key_heads(statistics.largest_query, heads))
        if fresh.architecture.qk_norms is not None:  # one gain serves all heads
            keys, queries = (sizes.amax(0, keepdim=True).expand_as(sizes) for sizes in (keys, queries))
        pair = settings.candidates[0]
        if len(settings.candidates) > 1 and self._cache is not None:
            pair = min(
                settings.candidates, key=lambda pair: self._score_error(statistics, smoothing_factors(keys, queries, *pair))
            )
        factors, pair = fresh.ranks.from_main((moved(smoothing_factors(keys, queries, *pair), CPU), pair))
        factors = factors.to(keys.device)
        smooth_keys(fresh.block, fresh.architecture, factors)
        repeated = factors.repeat_interleave(statistics.largest_query.shape[0] // heads, 0)
        statistics = replace(
            statistics,
            largest_key=statistics.largest_key / factors,
            largest_query=statistics.largest_query * repeated,
        )
        return {"alpha": pair[0], "beta": pair[1]}, statistics

    def _score_error(self, statistics: AttentionStatistics, factors: Tensor) -> float:
        """How far scores of queries with quantized keys are from those with keys as they are, over all pairs of tokens."""
        assert self._cache is not None
        assert self._settings.smooth_yx is not None
        heads = factors.shape[0]
        keys = statistics.keys / factors[:, None]
        error = self._cache.quantize(keys[None])[0] - keys
        queries = statistics.queries.view(heads, -1, *statistics.queries.shape[1:]) * factors[:, None, None]
        return _power(torch.einsum("khnd,kmd->khnm", queries, error), self._settings.smooth_yx.degree)


def smoothing_factors(first: Tensor, second: Tensor, alpha: float, beta: float) -> Tensor:
    """a^alpha / b^beta, with 1 where that is nothing or has no limit (section 8.5 of LMQuant's scheme)."""
    factors = first.clamp(min=_SMALLEST) ** alpha / second.clamp(min=_SMALLEST) ** beta
    return torch.where(torch.isfinite(factors) & (factors > 0), factors, torch.ones_like(factors))


def _power(difference: Tensor, degree: float) -> float:
    return difference.double().abs().pow(degree).sum().item()


def _reordered(statistics: ChannelStatistics, order: Order) -> ChannelStatistics:
    channels = order.channels
    return ChannelStatistics(
        hessian=statistics.hessian[channels][:, channels],
        mean_size=statistics.mean_size[channels],
        largest=statistics.largest[channels],
        sample=statistics.sample[:, channels],
    )


def _ranges(statistics: AttentionStatistics) -> Mapping[str, float]:
    """The largest query, key and value, for a cache whose range is known beforehand."""
    return {
        "queries": statistics.largest_query.max().item(),
        "keys": statistics.largest_key.max().item(),
        "values": statistics.largest_value.max().item(),
    }
