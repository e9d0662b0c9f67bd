"""Block-wise tuning: the continuous parameters of a compressed block against the outputs it should have."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algorithms.finetuning.config import BlockTuningKeys
from algorithms.finetuning.tunable import TunableLinear
from algorithms.modeling.block_loop import BlockData
from algorithms.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

_WARMUP_STEPS = 5
_TUNING_TOKENS = 2048  # of a micro-batch, where the recipe leaves its size open


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How to tune a block.

    Sequences, not tokens, are counted by ``batch_size`` and ``micro_batch_size``. The learning rate warms up over five steps
    and falls to zero along a cosine. ``early_stop`` epochs in a row without a better validation loss end the tuning. Every
    ``log_every``-th epoch is logged.
    """

    max_epochs: int
    batch_size: int
    micro_batch_size: int
    betas: tuple[float, float] = (0.9, 0.95)
    early_stop: int | None = None
    keep_best: bool = True
    recompute: bool = False
    log_every: int = 10


def tuning_settings(
    config: BlockTuningKeys, sequence_length: int, *, betas: tuple[float, float] = (0.9, 0.95)
) -> TuningSettings:
    """The keys of a recipe as :func:`tune_block` understands them, for sequences of so many tokens."""
    return TuningSettings(
        max_epochs=config.max_epochs,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size or max(1, _TUNING_TOKENS // sequence_length),
        betas=betas,
        early_stop=config.early_stop,
        keep_best=config.keep_best,
        recompute=config.use_checkpointing,
    )


@dataclass(kw_only=True)
class TuningReport:
    """What happened: mean squared errors before the first and after each epoch, and whether the block was put back."""

    training_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    reverted: str | None = None


def tune_block(
    index: int,
    block: nn.Module,
    data: BlockData,
    parameters: Sequence[tuple[nn.Parameter, float]],
    settings: TuningSettings,
    generator: torch.Generator,
) -> TuningReport:
    """Minimise the mean squared error of the block's outputs over ``parameters``, given as (tensor, learning rate).

    The ranks of ``data`` compute a share of every step each, from their own sequences in their own ``generator``'s order, and
    take the same steps with the sum of their gradients; all that is decided is decided on sums.

    With validation sequences the best epoch is restored at the end, the untouched start included. A loss that is not finite,
    or parameters that cannot be stored, put the block back to its best state, or to its start: it never ends the job.

    Returns:
        Losses by epoch; the block is changed in place and left without gradients.
    """
    data.ranks.meet()
    tensors = [parameter for parameter, _ in parameters]
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate, "peak": rate} for p, rate in parameters], betas=settings.betas)
    report = TuningReport()
    has_validation = data.has_validation()
    best, best_loss = _snapshot(tensors), math.inf
    if has_validation:
        best_loss = _validation_loss(index, block, data)
        report.validation_losses.append(best_loss)
    examples = _Examples(index, block, data, settings)
    steps = settings.max_epochs * examples.steps_per_epoch
    for parameter in tensors:
        parameter.requires_grad_(True)
    for epoch in range(settings.max_epochs):
        first_step = epoch * examples.steps_per_epoch
        loss = _run_epoch(examples, optimizer, tensors, first_step=first_step, steps=steps, generator=generator)
        report.training_losses.append(loss)
        validation = _validation_loss(index, block, data) if has_validation else loss
        is_finite = math.isfinite(loss) and math.isfinite(validation)
        if not (is_finite and _is_storable(tensors)):
            what = "loss not finite" if not is_finite else "parameters beyond what float16 holds"
            report.reverted = f"{what} in epoch {epoch + 1}"
            logger.warning("block %d: %s; its last good parameters are restored", index, report.reverted)
            break
        if has_validation:
            report.validation_losses.append(validation)
        if (epoch + 1) % settings.log_every == 0:
            logger.info("block %d, tuning epoch %d: training loss %.3g, validation %.3g", index, epoch + 1, loss, validation)
        if not has_validation or validation < best_loss:
            best_loss, report.best_epoch = validation, epoch + 1
            best = _snapshot(tensors)
        elif not settings.keep_best:
            best = _snapshot(tensors)
        if settings.early_stop is not None and epoch + 1 - report.best_epoch >= settings.early_stop:
            break
    _restore(tensors, best)
    return report


class _Examples:
    """The training sequences of one block, addressed singly: this rank's own, of batches that all ranks make up."""

    def __init__(self, index: int, block: nn.Module, data: BlockData, settings: TuningSettings) -> None:
        self._index = index
        self._block = block
        self._data = data
        self._settings = settings
        self.ranks = data.ranks
        self._places = [(b, row) for b, batch in enumerate(data.inputs.batches) for row in range(batch.shape[0])]
        # The ranks' sequences take turns; where their numbers differ by more than one, the ends of some turns stay empty.
        last = (len(self._places) - 1) * self.ranks.size + self.ranks.rank
        self._num_turns = max(self.ranks.gather(last)) + 1
        self.batch_size = min(settings.batch_size, self._num_turns)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; a last, smaller batch counts."""
        return math.ceil(self._num_turns / self.batch_size)

    def shuffled(self, generator: torch.Generator) -> Iterator[tuple[list[tuple[int, int]], int]]:
        """This rank's places of each batch, each sequence once in a fresh random order, and the elements of the whole batch."""
        order = torch.randperm(len(self._places), generator=generator).tolist()
        batches: list[list[tuple[int, int]]] = [[] for _ in range(self.steps_per_epoch)]
        for turn, place in enumerate(order):
            batches[(turn * self.ranks.size + self.ranks.rank) // self.batch_size].append(self._places[place])
        targets = self._data.targets.batches
        elements = [sum(targets[b][row].numel() for b, row in places) for places in batches]
        yield from zip(batches, map(int, self.ranks.sum_numbers(*elements)), strict=True)

    def backward(self, places: Sequence[tuple[int, int]], elements: int) -> float:
        """Accumulate this rank's part of the gradient of a batch's mean squared error; returns its part of that error."""
        inputs, targets = self._data.inputs, self._data.targets
        total = 0.0
        for micro in _equal_lengths(places, inputs.batches, self._settings.micro_batch_size):
            hidden = inputs.compute(torch.stack([inputs.batches[b][row] for b, row in micro]))
            wanted = inputs.compute(torch.stack([targets.batches[b][row] for b, row in micro]))
            loss = F.mse_loss(self._run(hidden).float(), wanted, reduction="sum") / elements
            loss.backward()
            total += loss.item()
        return total

    def step_context(self) -> ExitStack:
        """Weights decoded once for the micro-batches of a step."""
        stack = ExitStack()
        for module in self._block.modules():
            if isinstance(module, TunableLinear):
                stack.enter_context(module.shared_weight())
        return stack

    def _run(self, hidden: Tensor) -> Tensor:
        run: Callable[[Tensor], Tensor] = lambda x: self._data.inputs.arguments.run(self._block, self._index, x)  # noqa: E731
        return checkpoint(run, hidden, use_reentrant=False) if self._settings.recompute else run(hidden)


def _run_epoch(
    examples: _Examples,
    optimizer: torch.optim.Optimizer,
    tensors: Sequence[nn.Parameter],
    *,
    first_step: int,
    steps: int,
    generator: torch.Generator,
) -> float:
    losses = []
    for step, (places, elements) in enumerate(examples.shuffled(generator), start=first_step):
        factor = min(1.0, (step + 1) / _WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for settings in optimizer.param_groups:
            settings["lr"] = settings["peak"] * factor
        optimizer.zero_grad()
        with examples.step_context():
            part = examples.backward(places, elements)
        losses.append(_add_up(part, tensors, examples.ranks))
        if not math.isfinite(losses[-1]):
            return math.nan
        optimizer.step()
    return sum(losses) / len(losses)


def _add_up(loss: float, tensors: Sequence[nn.Parameter], ranks: Ranks) -> float:
    """Give every rank the sum of all gradients, in one message, and of the losses, which it returns."""
    if ranks.size == 1:
        return loss
    gradients = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]
    flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), gradients[0].new_tensor([loss])])
    ranks.sum_(flat)
    *summed, total = flat.split([*(tensor.numel() for tensor in tensors), 1])
    for tensor, gradient in zip(tensors, summed, strict=True):
        tensor.grad = gradient.view_as(tensor)
    return total.item()


@torch.no_grad()
def _validation_loss(index: int, block: nn.Module, data: BlockData) -> float:
    total, elements = 0.0, 0
    with ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, TunableLinear):
                stack.enter_context(module.shared_weight())
        for batch, target in zip(data.validation_inputs, data.validation_targets, strict=True):
            output = data.inputs.arguments.run(block, index, batch)
            total += F.mse_loss(output.float(), target.float(), reduction="sum").item()
            elements += target.numel()
    data.ranks.meet()
    total, num_elements = data.ranks.sum_numbers(total, elements)
    return total / num_elements


def _equal_lengths(places: Sequence[tuple[int, int]], batches: Sequence[Tensor], size: int) -> Iterator[list[tuple[int, int]]]:
    by_length: dict[int, list[tuple[int, int]]] = {}
    for place in places:
        by_length.setdefault(batches[place[0]].shape[1], []).append(place)
    for group in by_length.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _snapshot(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _is_storable(tensors: Sequence[Tensor]) -> bool:
    """Whether float16, in which blocks are stored, holds them: the last step of an epoch is in no loss yet."""
    return all(bool(tensor.detach().abs().amax() <= torch.finfo(torch.float16).max) for tensor in tensors if tensor.numel())


def _restore(tensors: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.requires_grad_(False)
        tensor.grad = None
        tensor.copy_(value)
