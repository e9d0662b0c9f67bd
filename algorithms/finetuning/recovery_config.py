"""The keys of ``recovery: {...}``: distillation of a compressed dense model from the original. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field

from algorithms.finetuning.distillation_keys import NOT_SHAPING, Decay, DistillationKeys, Names
from configs.values import Choice, Count, Flag, Nullable, Positive, flag

METHODS = ("full", "lora")
# By method: a full tuning's is a share of each tensor's size, which holds at every width; adapters start without one.
RATES = {"full": 1e-3, "lora": 2e-3}
_OF_LORA = {"rank", "alpha", "dropout", "target_modules"}
_OF_FULL = {"update_norms", "update_embeddings"}


class RecoveryConfig(DistillationKeys):
    """Recovery tuning. Further keys: :class:`algorithms.finetuning.distillation_keys.DistillationKeys`.

    ``lr: null`` is the method's own rate; ``lamb: null`` is true for full tuning at that rate, and otherwise false: a rate that
    was chosen for Adam stays one. ``target_modules`` name linears by the end of their names; empty is all of a block's.
    """

    method: Annotated[str, BeforeValidator(Choice(METHODS))] = "full"
    lamb: Annotated[bool | None, BeforeValidator(Nullable(flag))] = None  # lr is then a share of each tensor's size

    # what moves
    update_norms: Flag = True  # and biases; with method: full
    update_embeddings: Flag = True  # and the head; with method: full
    rank: Count = Field(default=16, alias="r")
    alpha: Positive = 32.0
    dropout: Decay = 0.0
    target_modules: Names = ()

    @property
    def rate(self) -> float:
        """The learning rate, ``lr`` or the method's own."""
        return RATES[self.method] if self.lr is None else self.lr

    @property
    def uses_lamb(self) -> bool:
        """Whether the rate is a share of each tensor's size."""
        return self.method == "full" and self.lr is None if self.lamb is None else self.lamb

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes the result."""
        free = {*NOT_SHAPING, *(_OF_LORA if self.method == "full" else _OF_FULL)}
        free |= set() if self.keep_best else {"eval_every_steps"}
        return self.model_dump(mode="json", exclude=free) | {"lr": self.rate, "lamb": self.uses_lamb}
