"""Runs a stage as it is, or, where it works in many equal steps, a few of them, and says what all would cost.

A stage tells of its steps through ``StageContext.progress``. Displays of few steps are left alone. One of many is sampled: the
stage is stopped in it and run again on a part of its text, short enough to come to its end. With T steps in all, s the median
cost of a sampled step, S sequences in the whole text and S' in the part, the stage is expected to cost

    T s + (what the run on the part took beyond its share T s S'/S of the steps)

so that what happens once, or once an epoch, counts as often as it will. A display after the first has been seen on the part
alone: its quickest step counts for the cost of a step, and its number of steps grows with the text.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from algorithms.base import Artifact, CompressionAlgorithm, StageContext, StageError, StageSpec
from jobs.estimation.extrapolation import Kind
from jobs.execution.resources import resident_bytes

WHOLE_STEPS = 12  # a display of at most so many is not sampled: most that size are one step a block
SAMPLED_STEPS = 5  # the first one warms up, or judges the start
ENOUGH_SECONDS = 120.0
_LEAST_SEQUENCES = 8


@dataclass(frozen=True)
class Spent:
    """User CPU seconds, children included, and wall seconds."""

    user_cpu_s: float
    wall_s: float

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.user_cpu_s + other.user_cpu_s, self.wall_s + other.wall_s)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.user_cpu_s - other.user_cpu_s, self.wall_s - other.wall_s)

    def times(self, factor: float) -> Spent:
        """So many times as much."""
        return Spent(self.user_cpu_s * factor, self.wall_s * factor)

    @property
    def or_nothing(self) -> Spent:
        """Negative parts are differences of noise."""
        return Spent(max(self.user_cpu_s, 0.0), max(self.wall_s, 0.0))


@dataclass(kw_only=True)
class Display:
    """One progress display: the clock when it opened, after each step, and when it closed."""

    total: int
    marks: list[Spent]
    closed: Spent | None = None

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.marks) - 1

    @property
    def cost(self) -> Spent:
        """From its opening to its end."""
        return (self.closed or self.marks[-1]) - self.marks[0]

    def step_cost(self) -> Spent:
        """Median of the steps after the first, or the first where there is no other."""
        steps = self._steps[1:] or self._steps
        return Spent(median(step.user_cpu_s for step in steps), median(step.wall_s for step in steps))

    def quickest_step(self) -> Spent:
        """The least of all, for what comes once an epoch is in some of them."""
        return Spent(min(step.user_cpu_s for step in self._steps), min(step.wall_s for step in self._steps))

    @property
    def _steps(self) -> list[Spent]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


@dataclass(kw_only=True)
class Account:
    """What a stage is expected to cost where it was sampled, the resident memory at its start, and what kind of work it is."""

    resident_bytes: int = 0
    sampled: Spent | None = None
    kind: Kind = Kind.OTHER


@dataclass(kw_only=True)
class _Watch:
    """The displays of one call of a stage. ``most`` steps are allowed to a display; beyond, it stops the stage."""

    clock: Callable[[], Spent]
    most: int | None
    displays: list[Display] = field(default_factory=list)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[str], None]]:
        """A display that nobody sees."""
        display = Display(total=total, marks=[self.clock()])
        self.displays.append(display)
        is_long = self.most is not None and total > self.most

        def step(note: str) -> None:
            """Note the time, and stop where that is enough."""
            display.marks.append(self.clock())
            if is_long and (display.done >= SAMPLED_STEPS or display.cost.wall_s > ENOUGH_SECONDS):
                raise _EnoughSeen

        yield step
        display.closed = self.clock()


class _EnoughSeen(Exception):  # noqa: N818 - control flow inside this file, not an error
    pass


def clock() -> Spent:
    """Now."""
    times = os.times()
    return Spent(times.user + times.children_user, time.monotonic())


def sampled_algorithm(kind: type[CompressionAlgorithm], accounts: dict[str, Account]) -> type[CompressionAlgorithm]:
    """The plugin with its own stages, each run through :func:`run_sampled`; ``accounts`` gets an entry a stage."""

    class Sampled(kind):
        """The plugin, watched."""

        def stages(self) -> Sequence[StageSpec]:
            """The plugin's, watched."""
            return [replace(spec, run=self._watched(spec)) for spec in super().stages()]

        def _watched(self, spec: StageSpec) -> Callable[[StageContext, Artifact], Artifact]:
            def run(context: StageContext, given: Artifact) -> Artifact:
                """In the place of the stage's own function."""
                account = accounts[spec.name] = Account(resident_bytes=resident_bytes())
                run_sampled(spec, context, given, account)
                return Artifact(kind=spec.kind, directory=context.output_dir, digest="")

            return run

    return Sampled


def run_sampled(
    spec: StageSpec,
    context: StageContext,
    given: Artifact,
    account: Account,
    *,
    read_clock: Callable[[], Spent] = clock,
) -> None:
    """Run a stage to its end, on all of its text or on a part.

    ``account.sampled`` becomes what it would cost on all of it, or stays None where that is what it has just cost.
    """
    watch = _Watch(clock=read_clock, most=max(WHOLE_STEPS, context.source.num_blocks))
    try:
        spec.run(replace(context, progress=watch.progress), given)
    except _EnoughSeen:
        first = watch.displays[-1]
    else:
        account.kind = _kind(watch.displays, context.source.num_blocks)
        return
    account.kind = Kind.TUNING
    before = watch.displays[:-1]
    count, whole = len(context.tokens), first.total
    part = min(count, max(_LEAST_SEQUENCES, -(-count * SAMPLED_STEPS // whole)))
    while True:
        _clear(context.output_dir)
        short = _Watch(clock=read_clock, most=None)
        started = read_clock()
        try:
            spec.run(replace(context, progress=short.progress, tokens=context.tokens[:part]), given)
        except StageError:  # the recipe holds more sequences out than there are
            if part == count:
                raise
            part = min(count, 4 * part)
            continue
        account.sampled = extrapolated(first, short.displays, read_clock() - started, part / count, place=len(before))
        return


def _kind(displays: Sequence[Display], blocks: int) -> Kind:
    if not displays:
        return Kind.OTHER
    return Kind.WALK if all(display.total == blocks for display in displays) else Kind.TUNING


def extrapolated(first: Display, short: Sequence[Display], took: Spent, share: float, *, place: int = 0) -> Spent:
    """The cost of a stage on all of its text.

    Args:
        first: the display in which the stage was stopped.
        short: the displays of the run on ``share`` of the text, which ``took`` so much in all.
        took: see there.
        share: of the sequences.
        place: which display of the short run is ``first`` again; those before it were not sampled.
    """
    steps = first.step_cost().times(first.total)
    again = short[place].cost
    expected = took + steps + (again - steps.times(share)).or_nothing - again
    for display in (display for display in short[place + 1 :] if display.done):
        expected += display.quickest_step().times(display.total * (1 / share - 1))
    return expected


def _clear(folder: Path) -> None:
    """Empty a stage's folder but for the runner's own mark."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith(".key"):
            path.unlink()
