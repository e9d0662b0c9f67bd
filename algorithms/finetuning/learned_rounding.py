"""Learned rounding: codes, scales and what surrounds them, against the outputs a block should have.

After AdaRound (arXiv 2004.10568) and SignRound (arXiv 2309.05516). Legend: O out_features, I in_features, G groups, g columns a
group. Each code is the rounded value of a trained position p, straight-through: it starts where the sweep left it, with the
fraction that the wanted weight has beyond that code, so that weights on the edge between two codes turn first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.finetuning.block_tuning import TuningReport, tune_block, tuning_settings
from algorithms.finetuning.config import BlockTuningConfig
from algorithms.finetuning.tunable import TunableLinear
from algorithms.modeling.block_loop import BlockData

_BETAS = (0.9, 0.999)
# A position is never on the edge itself: a first step of noise would turn it.
_MOST_FRACTION = 0.45


class RoundingLinear(TunableLinear):
    """A linear with uniform codes under training.

    Columns stand in an order in which groups are runs of neighbours; ``inverse`` brings them back into model order.

    Args:
        target: the weight that is wanted, [O, I].
        codes: [O, I], whole numbers 0 .. 2^bits - 1.
        scales: [O, G].
        zeros: [O, G], fixed.
        bits: of a code.
        bias: [O] or None.
        inverse: [I] int64 or None.
        scales_are_fixed: scales that cannot be stored with other values than these.
        outliers: rows [n], columns [n] and values [n] of weights that are not coded.
    """

    def __init__(
        self,
        target: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        *,
        bits: int,
        bias: Tensor | None,
        inverse: Tensor | None = None,
        scales_are_fixed: bool = False,
        outliers: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(bias)
        self._zeros, self._top, self._inverse = zeros, (1 << bits) - 1, inverse
        group_size = codes.shape[1] // scales.shape[1]
        wanted = target.view(*scales.shape, group_size) / scales[:, :, None] + zeros[:, :, None]
        codes = codes.float()
        # A scale whose two-level code stands for nothing wants no code more than another.
        fraction = (wanted.view_as(codes) - codes).nan_to_num_().clamp_(-_MOST_FRACTION, _MOST_FRACTION)
        self.positions = nn.Parameter(codes + fraction)
        self.scales = nn.Parameter(scales.clone(), requires_grad=False)
        self.scales_are_fixed = scales_are_fixed
        self.outliers = None if outliers is None else nn.Parameter(outliers[2].clone())
        self._places = None if outliers is None else outliers[:2]

    def decode(self) -> Tensor:
        """The weight [O, I], differentiable in positions, scales and outliers."""
        weight: Tensor = _Round.apply(self.positions, self.scales, self._zeros, self._top)
        if self.outliers is not None:
            weight = weight.index_put(self._places, self.outliers)
        return weight if self._inverse is None else weight[:, self._inverse]

    def current_codes(self) -> Tensor:
        """The codes [O, I] uint8 of the present positions."""
        return self.positions.detach().round().clamp_(0, self._top).to(torch.uint8)


class _Round(torch.autograd.Function):
    """scales * (round(positions) - zeros), whose gradient passes the rounding as it is and stops where codes are clamped."""

    @staticmethod
    def forward(ctx: Any, positions: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:  # noqa: ANN401 - torch's own
        """Positions [O, I], scales and zeros [O, G] to the weight [O, I]."""
        steps = positions.round().clamp_(0, top).view(*scales.shape, -1) - zeros[:, :, None]
        ctx.save_for_backward(positions, scales, steps)
        ctx.top = top
        return (steps * scales[:, :, None]).view_as(positions)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # noqa: ANN401
        """Gradient [O, I] to those of positions [O, I] and scales [O, G]."""
        positions, scales, steps = ctx.saved_tensors
        grouped = gradient.contiguous().view_as(steps)
        inside = (positions >= -0.5) & (positions <= ctx.top + 0.5)
        to_positions = (grouped * scales[:, :, None]).view_as(positions) * inside
        return to_positions, (grouped * steps).sum(-1), None, None


def tune_rounding(
    index: int, block: nn.Module, data: BlockData, config: BlockTuningConfig, generator: torch.Generator
) -> TuningReport:
    """Tune a block whose linears are :class:`RoundingLinear`; see :func:`algorithms.finetuning.block_tuning.tune_block`."""
    settings = tuning_settings(config, data.sequence_length, betas=_BETAS)
    return tune_block(index, block, data, learning_rates(block, config), settings, generator)


def learning_rates(block: nn.Module, config: BlockTuningConfig) -> Sequence[tuple[nn.Parameter, float]]:
    """Every parameter that is tuned, with Adam's peak rate for it."""
    steps: dict[int, float | None] = {}
    for module in block.modules():
        if isinstance(module, RoundingLinear):
            steps[id(module.positions)] = config.rounding_step
            steps[id(module.scales)] = None if module.scales_are_fixed else _relative(config.scale_step, module.scales)
    rates = []
    for parameter in block.parameters():
        step = steps.get(id(parameter), _relative(config.other_step, parameter))
        if step is not None and parameter.numel():
            rates.append((parameter, step))
    return rates


def _relative(step: float | None, parameter: nn.Parameter) -> float | None:
    """A share of the parameter's size as a rate; a bias that starts at zero has no size of its own."""
    return None if step is None else step * (parameter.detach().square().mean().sqrt().item() or 1.0)
