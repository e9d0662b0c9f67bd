"""A linear layer whose weight is a coded residual, a low-rank part and magnitudes, as it is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from algorithms.finetuning.tunable import TunableLinear
from algorithms.numerics.low_rank.factors import LowRank
from algorithms.numerics.low_rank.weight import LowRankWeight, with_magnitude


class LowRankLinear(TunableLinear):
    """Fixed codes; L1 [O, r], L2 [r, I], magnitudes [O] and what of the residual can move are parameters.

    Args:
        weight: to start from.
        bias: [O] or None.
    """

    def __init__(self, weight: LowRankWeight, bias: Tensor | None) -> None:
        super().__init__(bias)
        self._start = weight
        self.up = nn.Parameter(weight.low_rank.up.clone())
        self.down = nn.Parameter(weight.low_rank.down.clone())
        self.magnitude = nn.Parameter(weight.magnitude.clone())
        movable = weight.residual.movable()
        self.coded = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in movable.items()})

    def decode(self) -> Tensor:
        """The weight [O, I], differentiable in all parameters, the lengths of the rows included."""
        low_rank = self.up @ self.down
        return with_magnitude(self._start.residual.decode(dict(self.coded)) + low_rank, self.magnitude)

    def stored(self, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> LowRankWeight:
        """The weight as it is stored, with the present values of all parameters.

        Args:
            whole: makes whole tensors of parameters of which this process may hold a part.
        """
        start = self._start
        values = {name: whole(value.detach()) for name, value in self.coded.items()}
        up, down, magnitude = (whole(parameter.detach()) for parameter in (self.up, self.down, self.magnitude))
        return replace(
            start,
            residual=start.residual.moved(values) if values else start.residual,
            low_rank=LowRank.stored(up, down, start.low_rank.bits),
            magnitude=magnitude.half().float(),
        )
