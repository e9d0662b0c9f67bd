"""The keys of ``block_tuning: {...}`` and ``global_tuning: {...}`` of ReALLM. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator

from algorithms.finetuning.config import RATE, BlockTuningKeys
from algorithms.finetuning.distillation_keys import NOT_SHAPING, DistillationKeys
from configs.values import Choice, Count, Flag, OptionalPositive, Whole

DISTILLATION, CAUSAL_LM = "distillation", "causal_lm"
_STEP = Annotated[float | None, BeforeValidator(RATE)]
# A share of each tensor's size, which holds at every width.
_GLOBAL_RATE = 2e-3


class LowRankTuningConfig(BlockTuningKeys):
    """Steps are Adam's peak steps in shares of a tensor's size; null leaves those tensors as they are.

    ``lr`` is one absolute rate, as in the paper's code, in the place of all steps that are not null. With ``refit`` every
    linear is coded once more, from what the calibration made of it on, under the inputs that tuned blocks give.
    """

    max_epochs: Annotated[int, BeforeValidator(Whole(1))] = 8
    batch_size: Count = 4
    lr: OptionalPositive = None
    low_rank_step: _STEP = 0.01  # L1 and L2
    magnitude_step: _STEP = 0.003
    residual_step: _STEP = 0.003  # codebooks and scales of the residual
    other_step: _STEP = 0.003  # norms and biases
    refit: Flag = True


class GlobalTuningConfig(DistillationKeys):
    """Further keys: :class:`algorithms.finetuning.distillation_keys.DistillationKeys`.

    ``lr: null`` makes steps a share of each tensor's size; a number is Adam's rate. L1, L2 and magnitudes always move.
    """

    loss: Annotated[str, BeforeValidator(Choice((DISTILLATION, CAUSAL_LM)))] = DISTILLATION
    update_residual: Flag = True  # codebooks and scales
    update_norms: Flag = True  # and biases
    update_embeddings: Flag = False  # and the head

    @property
    def rate(self) -> float:
        """The learning rate."""
        return _GLOBAL_RATE if self.lr is None else self.lr

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes the result."""
        free = {*NOT_SHAPING, *(() if self.keep_best else ("eval_every_steps",))}
        return self.model_dump(mode="json", exclude=free)
