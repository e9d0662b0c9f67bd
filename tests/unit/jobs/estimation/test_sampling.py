"""Stages with a clock of their own: what a few steps foretell is what all of them would take."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from algorithms.base import Artifact, StageContext, StageError, StageSpec
from jobs.estimation.extrapolation import Kind
from jobs.estimation.sampling import SAMPLED_STEPS, WHOLE_STEPS, Account, Spent, run_sampled

LOADING, WRITING, JUDGING, STEP, PASS = 7.0, 2.0, 3.0, 0.25, 0.5  # seconds
BATCH = 4


class Clock:
    """Moves when a stage works; user CPU is twice the wall."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def read(self) -> Spent:
        return Spent(2 * self.now, self.now)


def context(folder: Path, sequences: int) -> StageContext:
    tokens = [torch.zeros(1, 4, dtype=torch.int64)] * sequences
    folder.mkdir(exist_ok=True)
    (folder / ".key.json").write_text("{}")
    return StageContext(
        source=SimpleNamespace(num_blocks=2),
        tokens=tokens,
        validation_tokens=(),
        output_dir=folder,
        scratch_dir=folder,
        device=torch.device("cpu"),
        seed=0,
        metrics=lambda values: None,
        progress=lambda description, total: pytest.fail("the stage's own display is not used"),
    )


def tuning(clock: Clock, *, epochs: int, cached: bool = False, held_out: int = 0):
    """A stage that loads, fills a cache where there is one, judges the start and every epoch, takes steps and writes."""

    def run(given: StageContext, artifact: Artifact) -> Artifact:
        count = len(given.tokens)
        if count <= held_out:
            raise StageError("nothing to learn from")
        clock.work(LOADING)
        if cached:
            with given.progress("cache", count) as step:
                for _ in range(count):
                    clock.work(PASS)
                    step("")
        steps = -(-count // BATCH)
        with given.progress("tuning", epochs * steps) as step:
            clock.work(JUDGING)
            for number in range(epochs * steps):
                clock.work(STEP)
                if (number + 1) % steps == 0:
                    clock.work(JUDGING)
                step("")
        clock.work(WRITING)
        (given.output_dir / "result.json").write_text(json.dumps({"sequences": count}))
        return artifact

    return StageSpec(name="tuning", run=run, directory="tuning", kind="tuned")


def sample(folder: Path, clock: Clock, spec: StageSpec, sequences: int) -> Spent | None:
    given, account = Artifact(kind="model", directory=folder, digest=""), Account()
    run_sampled(spec, context(folder, sequences), given, account, read_clock=clock.read)
    assert account.kind is Kind.TUNING
    return account.sampled


def exact(folder: Path, sequences: int, **options: object) -> float:
    """Wall seconds of the whole stage, by running it."""
    clock = Clock()
    whole = context(folder, sequences)
    with_progress = SimpleNamespace(**{**vars(whole), "progress": _silent})
    tuning(clock, **options).run(with_progress, Artifact(kind="model", directory=folder, digest=""))
    return clock.now


class _silent:  # noqa: N801 - stands in for a function
    def __init__(self, description: str, total: int) -> None:
        pass

    def __enter__(self):
        return lambda note: None

    def __exit__(self, *error: object) -> None:
        pass


def test_a_short_stage_runs_whole(tmp_path):
    clock = Clock()
    assert sample(tmp_path, clock, tuning(clock, epochs=1), BATCH * WHOLE_STEPS) is None
    assert clock.now == exact(tmp_path, BATCH * WHOLE_STEPS, epochs=1)
    assert json.loads((tmp_path / "result.json").read_text()) == {"sequences": BATCH * WHOLE_STEPS}


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_long_tuning_costs_what_its_steps_and_its_epochs_do(tmp_path, epochs):
    clock = Clock()
    found = sample(tmp_path, clock, tuning(clock, epochs=epochs), 4000)
    expected = exact(tmp_path / "whole", 4000, epochs=epochs)
    assert found.wall_s == pytest.approx(expected, rel=0.02)
    assert found.user_cpu_s == pytest.approx(2 * expected, rel=0.02)
    assert clock.now < 0.25 * expected
    assert (tmp_path / "result.json").is_file(), "later stages need a result"
    assert (tmp_path / ".key.json").is_file()


def test_the_largest_part_of_the_cost_may_be_in_the_first_display(tmp_path):
    clock = Clock()
    found = sample(tmp_path, clock, tuning(clock, epochs=2, cached=True), 2000)
    assert found.wall_s == pytest.approx(exact(tmp_path / "whole", 2000, epochs=2, cached=True), rel=0.3)


def test_a_part_that_is_too_short_for_the_recipe_is_made_longer(tmp_path):
    clock = Clock()
    found = sample(tmp_path, clock, tuning(clock, epochs=1, held_out=100), 4000)
    assert found.wall_s == pytest.approx(exact(tmp_path / "whole", 4000, epochs=1), rel=0.05)
    assert json.loads((tmp_path / "result.json").read_text())["sequences"] > 100


def test_an_error_of_the_stage_is_its_own(tmp_path):
    def run(given: StageContext, artifact: Artifact) -> Artifact:
        raise StageError("no")

    with pytest.raises(StageError, match="no"):
        sample(tmp_path, Clock(), StageSpec(name="x", run=run, directory="x", kind="x"), 10)


def test_no_more_steps_are_taken_than_are_looked_at(tmp_path):
    clock, taken = Clock(), []

    def run(given: StageContext, artifact: Artifact) -> Artifact:
        with given.progress("steps", len(given.tokens)) as step:
            for _ in given.tokens:
                clock.work(1.0)
                taken.append(len(given.tokens))
                step("")
        return artifact

    found = sample(tmp_path, clock, StageSpec(name="x", run=run, directory="x", kind="x"), 1000)
    assert taken.count(1000) == SAMPLED_STEPS
    assert len(taken) - SAMPLED_STEPS <= 8
    assert found.wall_s == pytest.approx(1000)


@pytest.mark.parametrize(("totals", "kind"), [((), Kind.OTHER), ((2,), Kind.WALK), ((2, 2), Kind.WALK), ((2, 9), Kind.TUNING)])
def test_a_walk_is_known_by_its_steps(tmp_path, totals, kind):
    def run(given: StageContext, artifact: Artifact) -> Artifact:
        for total in totals:
            with given.progress("steps", total) as step:
                for _ in range(total):
                    step("")
        return artifact

    account = Account()
    given = Artifact(kind="model", directory=tmp_path, digest="")
    spec = StageSpec(name="x", run=run, directory="x", kind="x")
    run_sampled(spec, context(tmp_path, 4), given, account, read_clock=Clock().read)
    assert (account.kind, account.sampled) == (kind, None)
