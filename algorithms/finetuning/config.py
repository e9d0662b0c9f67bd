"""The keys of ``block_tuning: {...}``: those of every method, and what methods with uniform codes add. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator

from configs.strict import Parameters
from configs.values import Count, Flag, Nullable, OptionalCount, Real, Whole

RATE = Nullable(Real(above=0.0, most=1.0))


class BlockTuningKeys(Parameters):
    """How a block is tuned, whatever moves in it. ``batch_size`` counts sequences."""

    max_epochs: Annotated[int, BeforeValidator(Whole(1))] = 6
    batch_size: Count = 8
    micro_batch_size: OptionalCount = None  # null: micro-batches of about 2048 tokens
    early_stop: OptionalCount = None
    keep_best: Flag = True
    use_checkpointing: Flag = False

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes the result; the others change memory alone."""
        return self.model_dump(mode="json", exclude={"micro_batch_size", "use_checkpointing"})


class BlockTuningConfig(BlockTuningKeys):
    """Learned rounding. Steps are Adam's peak steps: of a rounding position in codes, of everything else in shares of its size.

    null for a step leaves those tensors as they are.
    """

    rounding_step: Annotated[float | None, BeforeValidator(RATE)] = 0.01
    scale_step: Annotated[float | None, BeforeValidator(RATE)] = 0.003
    other_step: Annotated[float | None, BeforeValidator(RATE)] = 0.003  # norms, biases, outliers
