"""The original model's distributions: computed anew for every batch, or kept on disk as their most likely tokens.

Keeping ``k`` tokens of every position costs 6 k + 4 bytes of disk for each. What all other tokens have together is kept too, so
that the divergence over the k + 1 outcomes is exact, and a lower bound of the whole one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from algorithms.finetuning.distillation.batches import MicroBatch, in_micro_batches
from algorithms.finetuning.distillation.loss import TopLogits
from algorithms.modeling.files import atomic_save_tensors, atomic_write_json
from algorithms.parallel.ranks import Ranks

Autocast = Callable[[], AbstractContextManager[object]]

_DONE = "cache.json"
_KEPT = ("log_probabilities", "tokens", "tail")


class Teacher(Protocol):
    """What the student's logits are compared with."""

    def targets(self, batch: MicroBatch) -> Tensor | TopLogits:
        """The teacher's word on the positions that it judges, in the order of the mask, on the batch's device."""
        ...

    def judged(self, batch: MicroBatch) -> Tensor:
        """The positions of a batch on which it has a word, [b, length] bool: those that count, or some of them."""
        ...


def counted(logits: Tensor, mask: Tensor) -> Tensor:
    """The logits [n, V] of the positions of [b, length, V] that count; without a copy where all do."""
    return logits.flatten(0, 1) if mask.all() else logits[mask]


class LiveTeacher:
    """The original model itself.

    Args:
        model: a causal LM without gradients, sharded like the student where ranks share the work.
        autocast: the context in which it computes.
    """

    def __init__(self, model: nn.Module, autocast: Autocast) -> None:
        self._model, self._autocast = model, autocast

    @torch.no_grad()
    def targets(self, batch: MicroBatch) -> Tensor:
        """Logits [n, V]."""
        with self._autocast():
            logits = self._model(input_ids=batch.tokens, use_cache=False).logits
        return counted(logits, batch.mask)

    def judged(self, batch: MicroBatch) -> Tensor:
        """All positions that count."""
        return batch.mask


class TextTeacher:
    """The text itself: all probability is on the token that follows, and the divergence is a causal LM's own loss."""

    def targets(self, batch: MicroBatch) -> TopLogits:
        """The next tokens of all positions that have one."""
        following = batch.tokens.roll(-1, dims=1)[self.judged(batch)][:, None]
        certain = torch.zeros(following.shape, device=following.device)
        return TopLogits(log_probabilities=certain, tokens=following, tail=certain[:, 0])

    def judged(self, batch: MicroBatch) -> Tensor:
        """Every position that counts and is followed by one that does."""
        return batch.mask & torch.nn.functional.pad(batch.mask[:, 1:], (0, 1))


class CachedTeacher:
    """Reads what :func:`fill_cache` has kept.

    Args:
        directory: the cache's folder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def targets(self, batch: MicroBatch) -> TopLogits:
        """The kept log probabilities and tokens of the positions that count."""
        device = batch.tokens.device
        kept = [self._read(number) for row, number in enumerate(batch.numbers) if batch.mask[row].any()]
        if not kept:
            nothing = torch.empty(0, 1, device=device)
            return TopLogits(log_probabilities=nothing, tokens=nothing.int(), tail=nothing[:, 0])
        return TopLogits(**{name: torch.cat([tensors[name] for tensors in kept]).to(device) for name in _KEPT})

    def judged(self, batch: MicroBatch) -> Tensor:
        """All positions that count."""
        return batch.mask

    def _read(self, number: int) -> dict[str, Tensor]:
        return load_file(self._directory / f"{number}.safetensors")


def fill_cache(
    directory: Path, teacher: LiveTeacher, sequences: Sequence[Tensor], *, kept: int, micro_batch_size: int, ranks: Ranks
) -> Iterator[None]:
    """Keep the ``kept`` most likely tokens of every position of the sequences [1, length], one file a sequence.

    Yields once a micro-batch. A finished cache of as many tokens is left as it is; what an interrupted one left is made again.
    """
    if ranks.from_main(cached_tokens(directory)) == kept:
        return
    for batch in in_micro_batches(sequences, micro_batch_size, ranks):
        log_probabilities = teacher.targets(batch.to(ranks.device)).float().log_softmax(-1)
        values, tokens = log_probabilities.topk(min(kept, log_probabilities.shape[-1]), dim=-1)
        tail = (1 - values.double().exp().sum(-1)).clamp_(0, 1).float()
        lengths = batch.mask.sum(1).tolist()
        parts = (tensor.split(lengths) for tensor in (values.half(), tokens.int(), tail))
        for number, *tensors in zip(batch.numbers, *parts, strict=True):
            if tensors[0].numel():
                atomic_save_tensors(directory / f"{number}.safetensors", dict(zip(_KEPT, tensors, strict=True)))
        yield
    ranks.meet()
    if ranks.is_main:
        atomic_write_json(directory / _DONE, {"kept": kept, "sequences": len(sequences)})
    ranks.meet()


def cached_tokens(directory: Path) -> int | None:
    """How many tokens a finished cache keeps of each position, or None where there is none."""
    try:
        return int(json.loads((directory / _DONE).read_text(encoding="utf-8"))["kept"])
    except (OSError, ValueError, KeyError):
        return None
