"""Stops a job again and again, resumes it, and compares what it leaves with what an uninterrupted job leaves.

    python -m tests.faults.kill --recipe tests/faults/recipe.yaml --rounds 200
    python -m tests.faults.kill --recipe examples/quickstart/recipe.yaml --rounds 5 --signal TERM

A round is one stop, at a random moment: at one of the job's operations on files, which follow each other closely wherever
something could be left half done, or some time after one. ``--stops`` of them befall one job before it may end. All runs have
one thread, and are forked from one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.manifest import copy_of
from jobs.workspace import MANIFEST
from tests.faults.moments import read_trace
from tests.faults.warm_process import Outcome, WarmProcess

RESUME = "To resume: "
NOT_THE_RESULT = {"manifest.json", "metrics.jsonl", "certificate.json", "recipe.yaml", "README.md", "report.html", "wandb.json"}
TIMES = re.compile(rb'"\w*seconds": [0-9.e-]+')
SECOND = 0.2  # seconds after a first signal by which an impatient person has sent another
KEY = ".key.json"  # with a dot, and meant to stay


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A moment to stop at: the operation's number, the seconds after it, the signal, and when it comes a second time."""

    number: int
    delay: float
    signal: signal.Signals
    again: float = 0.0

    def __str__(self) -> str:
        return f"{self.signal.name} at operation {self.number}{f' + {self.delay:.3f} s' if self.delay else ''}"


class Harness:
    """A recipe, its uninterrupted run, and jobs of the same recipe that are stopped.

    Args:
        process: runs main.py.
        recipe: the recipe's file.
        overrides: of the recipe, but for USER_FOLDER.
        place: an empty folder for all jobs.
    """

    def __init__(self, process: WarmProcess, recipe: Path, overrides: Sequence[str], place: Path) -> None:
        self._process, self._recipe, self._overrides, self._place = process, recipe, overrides, place
        trace = place / "trace.jsonl"
        whole = place / "whole"
        done = self.run(whole, trace=str(trace))
        assert done.code == 0, done.said
        self.operations = read_trace(trace)
        self.expected = result(whole)
        self.seconds = done.seconds

    def run(self, folder: Path, **options: object) -> Outcome:
        """One run of the job in ``folder``."""
        argv = ("--yaml_path", str(self._recipe), f"USER_FOLDER={folder}", *self._overrides)
        return self._process.run(*argv, watch=str(folder), **options)

    def jobs(
        self, generator: random.Random, rounds: int, each: int, signals: Sequence[signal.Signals], *, twice: bool = False
    ) -> Iterator[list[Stop]]:
        """The stops of each job. The operations are cut into as many parts as there are rounds: no stage goes without."""
        total = len(self.operations)
        places = [1 + int((position + generator.random()) / rounds * total) for position in range(rounds)]
        number = -(-rounds // each)
        for first in range(number):
            stops, before = [], 0
            for at in places[first::number]:
                gap = max(self.operations[min(at, total - 1)][1] - self.operations[at - 1][1], 0.02)
                delay = generator.choice((0.0, generator.random() * gap))
                # A job that goes on has its beginning again, and then about what was left.
                again = self._beginning if before else 0
                place = again + at - before
                second = generator.random() * SECOND if twice else 0.0
                stops.append(Stop(number=place, delay=delay, signal=generator.choice(list(signals)), again=second))
                before = at
            yield stops

    @property
    def _beginning(self) -> int:
        """Operations before the first stage has a place for its result."""
        return next(number for number, _, what in self.operations if KEY in what)

    def job(self, stops: Sequence[Stop]) -> Iterator[str]:
        """Run a job, stopping it at each of ``stops`` in turn, then to its end; yields where each stop met it.

        Raises:
            AssertionError: something was left half done, was said wrongly, or is not what an uninterrupted job leaves.
        """
        folder = Path(tempfile.mkdtemp(dir=self._place))
        for stop in stops:
            done = self.run(folder, stop_at=stop.number, stop_with=stop.signal, delay=stop.delay, again=stop.again)
            check_stopped(done, stop, folder, self.expected)
            yield f"{stop}: {whereabouts(folder)}{' (it had ended)' if done.code == 0 else ''}"
        done = self.run(folder)
        assert done.code == 0, done.said
        found = result(folder)
        assert found == self.expected, f"{folder}: {differences(found, self.expected)}"
        belong = {KEY, copy_of(job_of(folder) / MANIFEST).name}
        hidden = [str(path) for path in job_of(folder).rglob(".*") if path.name not in belong]
        assert not hidden, f"left behind: {hidden}"
        stages = json.loads((job_of(folder) / "manifest.json").read_text())["stages"]
        assert {stage["status"] for stage in stages.values()} == {"finished"}
        shutil.rmtree(folder)


def job_of(folder: Path) -> Path:
    """The job's own folder below its user folder."""
    (job,) = (folder / "jobs").glob("*/*")
    return job


def result(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of what a job's result is made of: its own files and those of its stages."""
    job = job_of(folder)
    files = {path.relative_to(job): path for path in job.rglob("*") if path.is_file() and path.name not in NOT_THE_RESULT}
    shown = {name: path for name, path in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): hashlib.sha256(content(path)).hexdigest() for name, path in sorted(shown.items())}


def content(path: Path) -> bytes:
    """The bytes of a file; of a report, without the time that the work took."""
    return TIMES.sub(b"", path.read_bytes()) if path.suffix == ".json" else path.read_bytes()


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """The files in which two results differ."""
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return f"not what an uninterrupted job leaves: {', '.join(names)}"


def check_stopped(done: Outcome, stop: Stop, folder: Path, expected: dict[str, str]) -> None:
    """What has to hold after a stop, whatever the moment.

    Raises:
        AssertionError: it does not.
    """
    if done.code != 0:
        assert done.code == (-9 if stop.signal is signal.SIGKILL else 75), f"{stop}: exit code {done.code}\n{done.said[-3000:]}"
        assert stop.signal is signal.SIGKILL or RESUME in done.said, f"{stop}: no line says how to resume\n{done.said[-3000:]}"
        assert "Traceback" not in done.said, done.said[-3000:]
    for job in (folder / "jobs").glob("*/*"):
        for path in job.rglob("*.json"):
            if not any(part.startswith(".") for part in path.relative_to(job).parts):
                json.loads(path.read_text())
        for config in [path for path in (job / "config.json", *job.glob("exports/*/config.json")) if path.is_file()]:
            whole = {name for name in expected if (job / name).parent == config.parent}
            assert all((job / name).is_file() for name in whole), f"{stop}: {config} is there, but the model is not whole"
            for name in whole:
                assert hashlib.sha256(content(job / name)).hexdigest() == expected[name], f"{stop}: {name} is half done"


def whereabouts(folder: Path) -> str:
    """Which part of the job was under way when it was stopped."""
    try:
        manifest = json.loads((job_of(folder) / "manifest.json").read_text())
    except (ValueError, OSError):
        return "start"
    stages = manifest["stages"]
    running = [name for name, stage in stages.items() if stage["status"] != "finished"]
    if running or len(stages) < 3:
        return running[0] if running else f"after {next(reversed(stages), 'preparation')}"
    if manifest["certificate"] is None:
        return "certificate"
    if manifest["published"] is None or not manifest["published"]["key"]:
        return "publication"
    return "evaluation" if (manifest["evaluation"] or {}).get("time") is None else "card and report"


def main(argv: Sequence[str]) -> int:
    """The command line; 0 if all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--recipe", type=Path, default=Path("tests/faults/recipe.yaml"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--stops", type=int, default=1, help="of one job")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default=["KILL"], nargs="+")
    parser.add_argument("--twice", action="store_true", help="each signal comes a second time, at once or a little later")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    options = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    generator, met = random.Random(seed), Counter()
    place = Path(tempfile.mkdtemp(prefix="faults-"))  # stays where something does not hold
    with WarmProcess() as process:
        harness = Harness(process, options.recipe, options.overrides, place)
        said = f"seed {seed}; {len(harness.operations)} operations and {harness.seconds:.1f} s without a stop"
        sys.stdout.write(f"{said}; {len(harness.expected)} files compared\n")
        signals = [signal.Signals[f"SIG{name}"] for name in options.signal]
        for stops in harness.jobs(generator, options.rounds, options.stops, signals, twice=options.twice):
            for line in harness.job(stops):
                met[line.rpartition(": ")[2]] += 1
                sys.stdout.write(f"{sum(met.values()):4d} {line}\n")
                sys.stdout.flush()
    shutil.rmtree(place)
    places = ", ".join(f"{name} {count}" for name, count in met.most_common())
    sys.stdout.write(f"{sum(met.values())} rounds held ({places})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
