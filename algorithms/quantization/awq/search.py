"""The search for AWQ's factors, group by group, on the block as the original model has it.

Legend: O out_features, I in_features; H mean of x x^T over the tokens that reach a group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from algorithms.blockwise.coded import FreshBlock
from algorithms.modeling.activations import Activations
from algorithms.modeling.block_loop import relative_output_error
from algorithms.modeling.mixtures.deferred import hold_all
from algorithms.modeling.transforms.folding import can_fold, feeder_rows, fold, group_of, shared
from algorithms.modeling.transforms.survey import ChannelStatistics, first_tokens, survey
from algorithms.numerics.column_sweep import column_costs
from algorithms.numerics.grids.channel_scales import (
    Candidate,
    Chosen,
    activation_scales,
    best_candidate,
    search_ratios,
    some_rows,
    weight_shares,
)
from algorithms.numerics.grids.nearest_codes import nearest_codes
from algorithms.numerics.uniform import Grid, RangeSearch
from algorithms.parallel.ranks import moved
from algorithms.quantization.awq.config import BOTH, AwqConfig

logger = logging.getLogger(__name__)

# A candidate is judged by few ranges: which ratio is best hardly depends on how finely they are searched.
_RANGES = RangeSearch(factors=(1.0, 0.9, 0.8, 0.7))
# Tokens for each input of the widest linear that a search looks at: it estimates H, and one number from it.
_TOKENS_PER_INPUT = 8
_OUTPUT_TOKENS = 4096  # that a candidate is judged by where it takes a forward

Loss = Callable[[Tensor], float]


class ScaleSearch:
    """Finds and folds the factors of a block.

    Args:
        config: of the recipe.
    """

    def __init__(self, config: AwqConfig) -> None:
        self._config = config
        search = _RANGES if config.apply_clip else None
        self._grid = Grid(bits=config.bits, symmetric=not config.zero_point, search=search)
        self._left_alone: set[str] = set()  # groups that nothing takes factors for, once the log has them

    def prepare(self, fresh: FreshBlock) -> Mapping[str, object]:
        """Fold the best factors of every group; returns what was chosen, and the share of the error that is left with it."""
        assert fresh.inputs is not None, "AWQ looks at activations"
        block, architecture, ranks, report = fresh.block, fresh.architecture, fresh.ranks, {}
        widest = max(block.get_submodule(name).weight.shape[1] for group in architecture.groups_in(block) for name in group)
        tokens = first_tokens(fresh.inputs, -(-_TOKENS_PER_INPUT * widest // ranks.size))
        by_output = self._config.objective == "block_output"
        if by_output:
            hold_all(block)
        found = survey(block, fresh.index, tokens, architecture, ranks, min_expert_tokens=self._config.min_expert_tokens)
        leaders = [group[0] for group in architecture.groups_in(block)]
        rows = {leader: feeder_rows(block, architecture, leader) for leader in leaders if leader in architecture.feeders}
        chosen: dict[str, Chosen] = {}
        for leader, statistics, weights in list(found) if by_output else found:
            if not can_fold(architecture, leader):
                self._leave_alone(group_of(architecture, leader))
                continue
            loss = self._output_loss(fresh, group_of(architecture, leader)) if by_output else None
            chosen[leader] = self.best(weights, statistics, rows=rows.get(leader), loss=loss)
        for leader, best in chosen.items():
            ranks.meet()
            # Machines that round differently must not fold different factors.
            scales, label = ranks.from_main(moved((best.candidate.scales, best.candidate.label), torch.device("cpu")))
            fold(block, architecture, leader, scales.to(fresh.inputs.device))
            share = best.loss / best.plain_loss if best.plain_loss else 1.0
            report[leader] = {"factors": label, "error_share": share}
        return {"scaling": report}

    def best(
        self,
        weights: Sequence[Tensor],
        statistics: ChannelStatistics,
        *,
        rows: Tensor | None = None,
        loss: Loss | None = None,
    ) -> Chosen:
        """The best factors for the input channels of linears that share an input.

        Args:
            weights: of the linears, [O, I] each.
            statistics: of the input.
            rows: the feeder's row behind each channel, [I]; channels with one row get one factor.
            loss: of factors [I]; None judges them by what errors in each column cost.
        """
        matrix = some_rows(torch.cat(list(weights)))
        loss = self._column_loss(matrix, statistics.hessian) if loss is None else loss
        kinds = (False, True) if self._config.duo_scaling == BOTH else (self._config.duo_scaling,)
        found = [
            search_ratios(
                partial(self._candidate, matrix=matrix, sizes=statistics.mean_size, duo=bool(duo), rows=rows),
                loss,
                steps=self._config.search_steps,
            )
            for duo in kinds
        ]
        return best_candidate(found, loss(torch.ones_like(statistics.mean_size)), matrix.shape[1], matrix)

    def _candidate(self, ratio: float, *, matrix: Tensor, sizes: Tensor, duo: bool, rows: Tensor | None) -> Candidate:
        shares = weight_shares(matrix, self._group_size(matrix)) if duo else None
        scales = activation_scales(sizes, shares, ratio)
        if rows is not None:
            scales = shared(scales, rows.to(scales.device))
        return Candidate(scales=scales, label=f"{'duo' if duo else 'inputs'} {ratio:g}")

    def _column_loss(self, matrix: Tensor, hessian: Tensor) -> Loss:
        """What rounding W diag(s) costs: an error by H_jj, or by what is left of it where the sweep makes up for errors."""
        costs = column_costs(hessian, self._config.damping) if self._config.gptq else hessian.diagonal()

        def _loss(scales: Tensor) -> float:
            errors = self._rounded(matrix, scales).sub_(matrix).square_()
            return torch.sum(errors @ costs, dtype=torch.float64).item()

        return _loss

    def _output_loss(self, fresh: FreshBlock, group: tuple[str, ...]) -> Loss:
        """How far the block's outputs move, in one forward over some of the tokens."""
        assert fresh.inputs is not None
        block, index, ranks = fresh.block, fresh.index, fresh.ranks
        inputs, targets = _judged(first_tokens(fresh.inputs, -(-_OUTPUT_TOKENS // ranks.size)), block, index)

        def _loss(scales: Tensor) -> float:
            weights = {name: self._rounded(block.get_submodule(name).weight, scales) for name in group}
            with _replaced(block, weights):
                return relative_output_error(block, index, inputs, targets, ranks)

        return _loss

    def _rounded(self, matrix: Tensor, scales: Tensor) -> Tensor:
        """W as it would be stored with factors, and applied without them."""
        codes = nearest_codes(matrix * scales, group_size=self._group_size(matrix), grid=self._grid)
        return codes.dequantize().div_(scales)

    def _group_size(self, matrix: Tensor) -> int:
        return matrix.shape[1] if self._config.group_size == -1 else self._config.group_size

    def _leave_alone(self, group: tuple[str, ...]) -> None:
        if group[0] not in self._left_alone:
            self._left_alone.add(group[0])
            logger.info("%s: nothing before takes factors, so the input channels stay as they are", ", ".join(group))


def _judged(inputs: Activations, block: nn.Module, index: int) -> tuple[Activations, Activations]:
    """The sequences with finite outputs, and these outputs: by others no candidate could be judged."""
    outputs = inputs.through(block, index)
    usable = [torch.isfinite(output).flatten(1).all(1) for output in outputs.batches]
    kept = [[batch[rows] for batch, rows in zip(part.batches, usable, strict=True) if rows.any()] for part in (inputs, outputs)]
    return replace(inputs, batches=kept[0]), replace(outputs, batches=kept[1])


@contextmanager
def _replaced(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in linears of a block, for the time being."""
    before = {name: block.get_submodule(name).weight.data for name in weights}
    for name, weight in weights.items():
        block.get_submodule(name).weight.data = weight
    try:
        yield
    finally:
        for name, weight in before.items():
            block.get_submodule(name).weight.data = weight
