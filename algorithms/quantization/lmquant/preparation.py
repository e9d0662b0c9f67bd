"""What QoQ does to a block before its weights are coded: another order of channels, smoothed inputs, smoothed keys.

Legend: I input channels of a group, O rows of its linears, H query heads, K heads of keys, d channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from algorithms.blockwise.coded import FreshBlock
from algorithms.modeling.transforms.attention import (
    AttentionStatistics,
    attention_survey,
    of_key_heads,
    of_pairs,
    scores,
    smooth_keys,
)
from algorithms.modeling.transforms.folding import can_fold, feeder_rows, fold, largest_shared
from algorithms.modeling.transforms.reorder import SEQUENTIAL, TRANSPOSE, Order, channel_order, reorder
from algorithms.modeling.transforms.survey import ChannelStatistics, whole_survey
from algorithms.numerics.activations.rounding import fake_quantize_tokens
from algorithms.numerics.codebooks.additive import quadratic_error
from algorithms.numerics.grids.channel_scales import some_rows
from algorithms.parallel.ranks import moved
from algorithms.quantization.lmquant.serving import cache_of
from algorithms.quantization.lmquant.settings import ROW, Settings, role_of

CPU = torch.device("cpu")
AS_IT_IS = "as it is"
_SMALLEST = 1e-5  # of a size whose power is taken

Rounded = Callable[[Tensor], Tensor]


class Preparation:
    """Changes a block in the order reorder, xw, yx; the rotation is the source's.

    What ranks choose between is compared on each of them, in an arithmetic of its own; rank 0's choice counts.

    Args:
        settings: of the recipe.
        rounded: W [O, I] as its codes would have it, by rounding to nearest.
    """

    def __init__(self, settings: Settings, rounded: Rounded) -> None:
        self._settings, self._rounded = settings, rounded

    def prepare(self, fresh: FreshBlock) -> Mapping[str, object]:
        """Change the block; returns what was chosen, by the first linear of each group."""
        settings, report = self._settings, {}
        assert fresh.inputs is not None, "LMQuant looks at activations"
        if settings.reorder is not None or settings.smooth_xw is not None:
            found = whole_survey(fresh.block, fresh.index, fresh.inputs, fresh.architecture, fresh.ranks)
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
                names = ("queries", "keys", "values")
                report["cache_ranges"] = dict(zip(names, statistics.largest, strict=True))
        return report

    def _reorder(self, fresh: FreshBlock, found: dict[str, ChannelStatistics]) -> Mapping[str, str]:
        settings, weights = self._settings.reorder, self._settings.weights
        assert settings is not None
        searches = settings.strategy == "GridSearch"
        chosen = {}
        for leader in fresh.architecture.feeders:
            if role_of(fresh.architecture, leader) in settings.skips:
                continue
            statistics = found[leader]
            width = statistics.largest.shape[0]
            group_size = width if weights is None or weights.group_size == ROW else weights.group_size
            orders = {
                index: channel_order(
                    fresh.block, fresh.architecture, leader, statistics.largest, index=index, group_size=group_size
                )
                for index in ((SEQUENTIAL, TRANSPOSE) if searches else (settings.index,))
            }
            index = self._best_order(fresh, leader, statistics, orders) if searches else settings.index
            chosen[leader], order = fresh.ranks.from_main((index, moved(orders.get(index), CPU)))
            if order is not None:
                order = moved(order, statistics.largest.device)
                reorder(fresh.block, fresh.architecture, leader, order)
                found[leader] = statistics.reordered(order.channels)
        return chosen

    def _best_order(self, fresh: FreshBlock, leader: str, statistics: ChannelStatistics, orders: Mapping[str, Order]) -> str:
        """The order in which rounding costs least; ``as it is`` where none is better than the model's own."""
        matrix = some_rows(fresh.block.get_submodule(leader).weight)
        losses = {AS_IT_IS: quadratic_error(self._rounded(matrix) - matrix, statistics.hessian)}
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
        keys = of_pairs(statistics.largest_key)
        queries = of_pairs(of_key_heads(statistics.largest_query, keys.shape[0]))
        if fresh.architecture.qk_norms is not None:  # one gain serves all heads
            keys, queries = (sizes.amax(0, keepdim=True).expand_as(sizes) for sizes in (keys, queries))
        pair = self._best_key_pair(settings.candidates, statistics, keys, queries)
        factors, pair = fresh.ranks.from_main((moved(smoothing_factors(keys, queries, *pair), CPU), pair))
        factors = factors.to(keys.device)
        smooth_keys(fresh.block, fresh.architecture, factors)
        return {"alpha": pair[0], "beta": pair[1]}, statistics.smoothed(factors)

    def _best_key_pair(
        self, candidates: Sequence[tuple[float, float]], statistics: AttentionStatistics, keys: Tensor, queries: Tensor
    ) -> tuple[float, float]:
        """The exponents with which scores of rounded keys and queries are nearest to those of neither, over pairs of tokens."""
        cache, smoothing = self._settings.cache, self._settings.smooth_yx
        if len(candidates) == 1 or cache is None or (cache.skip_k and cache.skip_q):
            return candidates[0]
        assert smoothing is not None
        wanted = scores(statistics.queries, statistics.keys)

        def _loss(pair: tuple[float, float]) -> float:
            smoothed = statistics.smoothed(smoothing_factors(keys, queries, *pair))
            held = cache_of(self._settings, smoothed.largest if cache.static else None)
            assert held is not None
            query, key, _ = held.held(smoothed.queries[None], smoothed.keys[None], smoothed.keys[None])
            return _power(scores(query[0], key[0]) - wanted, smoothing.degree)

        return min(candidates, key=_loss)


def smoothing_factors(first: Tensor, second: Tensor, alpha: float, beta: float) -> Tensor:
    """a^alpha / b^beta; 1 where either side shows nothing, of which nothing can be learned."""
    factors = first.clamp(min=_SMALLEST) ** alpha / second.clamp(min=_SMALLEST) ** beta
    return torch.where((first > 0) & (second > 0) & torch.isfinite(factors), factors, torch.ones_like(factors))


def _power(difference: Tensor, degree: float) -> float:
    return difference.double().abs().pow(degree).sum().item()
