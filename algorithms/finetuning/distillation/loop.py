"""Distillation: a student learns the original model's next-token distributions, step by step, and can be killed at any.

Everything that is random depends on the seed and the number of the step, and a step is whole or has not happened: a run that
goes on from a checkpoint repeats the same steps with the same results.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.finetuning.distillation.batches import Batches, MicroBatch, in_micro_batches
from algorithms.finetuning.distillation.checkpoints import Checkpoints
from algorithms.finetuning.distillation.loss import kl_divergence
from algorithms.finetuning.distillation.sharding import local, set_summing
from algorithms.finetuning.distillation.student import StepReport, Student
from algorithms.finetuning.distillation.teacher import Autocast, Teacher, counted
from algorithms.finetuning.distillation_keys import DistillationKeys
from algorithms.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

_SAVE_SECONDS = 600.0
_LARGEST_STORED = 65504.0  # in float16
_MAX_FAILURES = 3  # steps in a row without a finite loss


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, in what portions, and what is written down when.

    Sequences are counted by ``batch_size`` (over all ranks) and ``micro_batch_size``. ``schedule`` is ``constant``, or
    ``linear`` or ``cosine``, a fall to zero at the last step; before, rates rise over ``warmup_steps``. The student is judged
    every ``evaluate_every`` steps (None: after each epoch), saved every ``save_every`` (None: after each epoch and ten
    minutes), described every ``print_every``. ``keep_best`` ends with the state of the lowest held-out divergence, the start
    included.
    """

    max_epochs: int
    batch_size: int
    micro_batch_size: int | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    evaluate_every: int | None = None
    save_every: int | None = None
    print_every: int | None = 1
    keep_best: bool = False
    sums_once: bool = False
    seed: int = 0

    @classmethod
    def of(cls, config: DistillationKeys) -> LoopSettings:
        """The keys of a recipe as the loop understands them."""
        return cls(
            max_epochs=config.max_epochs,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            schedule=config.lr_schedule,
            warmup_steps=config.warmup_steps,
            evaluate_every=config.eval_every_steps,
            save_every=config.save_every_steps,
            print_every=config.print_every_steps,
            keep_best=config.keep_best,
            seed=config.seed,
        )

    def factor(self, step: int, steps: int) -> float:
        """Of the learning rates at a step, from 0."""
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        falling = {"constant": 1.0, "linear": 1 - step / steps, "cosine": 0.5 * (1 + math.cos(math.pi * step / steps))}
        return rising * falling[self.schedule]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the loop talks to. ``evaluate`` gives perplexities of texts that are shown and decide nothing.

    The user knows this tuning by its ``name``, and lowers ``rates`` where it diverges.
    """

    name: str
    rates: str
    ranks: Ranks
    directory: Path
    autocast: Autocast
    metrics: Callable[[Mapping[str, object]], None]
    advance: Callable[[str], None]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None


@dataclass(kw_only=True)
class History:
    """A run so far, as its checkpoints keep it: a loss for every step, and each evaluation."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    best_divergence: float | None = None
    skipped: list[int] = field(default_factory=list)
    stopped: str | None = None

    @property
    def is_usable(self) -> bool:
        """Whether the student is worth keeping: it came to its end, or a good state of it was put back."""
        return self.stopped is None or self.best_step is not None


def distill(
    student: Student,
    teacher: Teacher,
    training: Sequence[Tensor],
    held_out: Sequence[Tensor],
    settings: LoopSettings,
    around: Surroundings,
) -> History:
    """Minimise the mean KL(teacher, student) over all tokens that count.

    Args:
        student: tuned in place; ends as the last step left it, or as its best evaluation did.
        teacher: the original model; one that has been cached knows the training sequences, and after them those held out.
        training: token sequences [1, length] to learn from, the same on every rank.
        held_out: those to judge by; may be empty.
        settings: see there.
        around: ranks, folder and displays; the folder's checkpoints are gone on from.

    Returns:
        What happened.
    """
    run = _Run(student, teacher, training, held_out, settings, around)
    run.resume()
    while run.step < run.steps and run.history.stopped is None:
        run.take_step()
    run.finish()
    return run.history


class _Run:
    """The state of one call of :func:`distill`. ``step`` is how many steps are done."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        training: Sequence[Tensor],
        held_out: Sequence[Tensor],
        settings: LoopSettings,
        around: Surroundings,
    ) -> None:
        self._student, self._teacher = student, teacher
        self._training, self._held_out = training, held_out
        self._settings, self._around, self._ranks = settings, around, around.ranks
        self._batches = Batches(
            training,
            batch_size=settings.batch_size,
            micro_batch_size=settings.micro_batch_size,
            seed=settings.seed,
            ranks=around.ranks,
        )
        self._newest = Checkpoints(around.directory, ".checkpoint", around.ranks)
        self._best = Checkpoints(around.directory, ".best", around.ranks)
        self._saved = time.monotonic()
        self.step, self.history = 0, History()
        self.steps = settings.max_epochs * self._batches.steps_per_epoch

    def resume(self) -> None:
        """Go on from the newest checkpoint; without one, judge the start."""
        found = self._newest.newest()
        if found is None:
            self._judge()
            return
        self.step = found["step"]
        self.history = History(**found["history"])
        self._newest.load(self.step, self._student.state())
        self._student.loaded()
        logger.info("%s goes on after step %d of %d", self._around.name, self.step, self.steps)
        for _ in range(self.step):
            self._around.advance("done before")

    def take_step(self) -> None:
        """One step, and what is due after it."""
        started = time.process_time()
        loss = self._accumulate()
        if not (math.isfinite(loss) and self._student.gradients_are_finite()):
            self._skip(loss)
            return
        taken = self.step - len(self.history.skipped)  # a step that was left out has left no trace in the moments
        report = self._student.step(taken + 1, self._settings.factor(self.step, self.steps))
        self.step += 1
        self.history.losses.append(loss)
        self._describe(loss, report, time.process_time() - started)
        if self.step == self._batches.steps_per_epoch and (complaint := self._student.complaint()):
            logger.warning(complaint)
        if self._is_due(self._settings.evaluate_every) or self.step == self.steps:
            self._judge()
        if self._is_due(self._settings.save_every) or self._is_late():
            self._save()

    def finish(self) -> None:
        """Put the best state back if that is asked for, and see whether the last one can be stored at all."""
        sizes = [local(tensor).abs().max().item() for tensor in self._floating()]
        (beyond,) = self._ranks.sum_numbers(float(any(not size <= _LARGEST_STORED for size in sizes)))  # NaN is beyond, too
        if beyond and self.history.stopped is None:
            self.history.stopped = "a tensor has grown beyond what can be stored"
            self._warn("has diverged")
        best = self.history.best_step
        if not self._settings.keep_best or best is None or best == self.step:
            return
        if self._best.is_intact(best):
            self._best.load(best, self._student.values())
            self._student.loaded()
            logger.info("the student of step %d is kept: its held-out divergence was the lowest", best)
        else:
            self.history.best_step = None
            logger.warning("the student of the last step is kept, since that of step %d is damaged", best)

    def _floating(self) -> Iterator[Tensor]:
        return (
            tensor.detach()
            for tensor in self._student.values().values()
            if tensor.is_floating_point() and local(tensor).numel()
        )

    def _accumulate(self) -> float:
        """Forward and backward of a step's micro-batches; returns the mean divergence over all ranks."""
        micros, tokens = self._batches.step(self.step)
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for place, micro in enumerate(micros):
            sums = not self._settings.sums_once or place == len(micros) - 1
            set_summing(self._student.model, sums)
            self._student.set_summing(sums)
            self._student.passing(self.step, micro.numbers)
            divergence = self._divergence(micro.to(self._ranks.device))
            (divergence / tokens).backward()
            total += divergence.detach()
        self._ranks.sum_(total)
        return total.item() / tokens

    def _divergence(self, batch: MicroBatch) -> Tensor:
        """Sum over the batch's tokens that count."""
        targets = self._teacher.targets(batch)
        with self._around.autocast():
            logits = self._student.model(input_ids=batch.tokens, use_cache=False).logits
        return kl_divergence(counted(logits, self._teacher.judged(batch)), targets)

    def _skip(self, loss: float) -> None:
        """Leave a step out whose loss or gradient is not finite; several in a row end the tuning."""
        self._student.discard_gradients()
        self.step += 1
        self.history.losses.append(loss)
        self.history.skipped.append(self.step)
        what = "gradient is not finite" if math.isfinite(loss) else f"loss is {loss}"
        logger.warning("step %d: the %s; nothing moves in this step", self.step, what)
        self._around.advance(f"loss {loss}")
        last = list(range(self.step - _MAX_FAILURES + 1, self.step + 1))
        if self.history.skipped[-_MAX_FAILURES:] == last:
            self.history.stopped = f"loss or gradient were not finite in steps {last[0]} to {last[-1]}"
            self._warn("ends")

    def _warn(self, what: str) -> None:
        logger.warning("%s %s: %s; lower %s", self._around.name, what, self.history.stopped, self._around.rates)

    def _describe(self, loss: float, report: StepReport, cpu_seconds: float) -> None:
        line: dict[str, object] = {"event": "step", "step": self.step, "loss": loss, "cpu_seconds": round(cpu_seconds, 4)}
        note = f"KL {loss:.4g}"
        if report.gradient_norm is not None:
            line["gradient_norm"] = report.gradient_norm
            note += f", gradient norm {report.gradient_norm:.3g}"
        note += f", {report.note}" if report.note else ""
        self._around.metrics(line | dict(report.counts))
        every = self._settings.print_every
        self._around.advance(note if every and self.step % every == 0 else "")

    def _is_due(self, every: int | None) -> bool:
        return self.step % (every or self._batches.steps_per_epoch) == 0

    def _is_late(self) -> bool:
        """Whether ten minutes have passed, by rank 0's clock; only where no interval is asked for."""
        if self._settings.save_every is not None:
            return False
        (late,) = self._ranks.sum_numbers(float(self._ranks.is_main and time.monotonic() - self._saved > _SAVE_SECONDS))
        return late > 0

    @torch.no_grad()
    def _judge(self) -> None:
        """Divergence on the held-out sequences, which decides, and perplexities, which do not."""
        found: dict[str, Any] = {"step": self.step}
        self._student.passing(None, ())
        if self._held_out:
            found["divergence"] = self._held_out_divergence()
        if self._around.evaluate is not None and self.step > 0:
            found["perplexity"] = dict(self._around.evaluate(self._student.model))
        if len(found) == 1:
            return
        self.history.evaluations.append(found)
        self._around.metrics({"event": "evaluation", **found})
        shown = [f"held-out KL {found['divergence']:.4g}"] if self._held_out else []
        shown += [f"{name} perplexity {value:.5g}" for name, value in found.get("perplexity", {}).items()]
        logger.info("step %d: %s", self.step, ", ".join(shown))
        if self._settings.keep_best and self._is_better(found):
            self.history.best_step, self.history.best_divergence = self.step, found["divergence"]
            self._best.save(self.step, self._student.values(), {})

    def _is_better(self, found: Mapping[str, Any]) -> bool:
        best = self.history.best_divergence
        return "divergence" in found and (best is None or found["divergence"] < best)

    def _held_out_divergence(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        size = self._settings.micro_batch_size or self._settings.batch_size
        # Numbered behind the training sequences, as a teacher's cache has them.
        sequences = [*self._training, *self._held_out]
        for batch in in_micro_batches(sequences, size, self._ranks, first=len(self._training)):
            total += self._divergence(batch.to(self._ranks.device))
        self._ranks.sum_(total)
        return total.item() / sum(sequence.numel() for sequence in self._held_out)

    def _save(self) -> None:
        self._newest.save(self.step, self._student.state(), {"history": asdict(self.history)})
        self._newest.keep_only(self.step)
        self._best.keep_only(self.history.best_step)
        self._saved = time.monotonic()
