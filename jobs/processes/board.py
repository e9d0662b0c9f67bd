"""The board on which the ranks of a job leave notes for each other while no process group is open.

It is a key-value store that every rank can reach. Rank 0 leads: it numbers what it orders (1, 2, ...) and says when the job is
over. The other ranks follow: they look for the next order, say that they are ready for it, or what went wrong.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch.distributed as dist

from algorithms.base import Artifact, Process
from configs.errors import ExitCode, MissingEnvironmentError, RankFailedError, RankLostError
from jobs.processes.connection import is_lost_connection
from jobs.processes.pulse import Pulse, spans_nodes

TO_CONNECT = timedelta(minutes=5)
NAP = 0.1  # seconds between two looks; short, so that signals are handled in between
ENDED, FAILED = "ended", "failed"


class Dismissed(Exception):  # noqa: N818 - no error: the leader has ended the job, for a reason that it tells itself
    """The leader has ended the job; a follower leaves without a word."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A stage that all ranks run together: what a follower cannot know from the recipe."""

    stage: str
    model_directory: str
    model_name: str
    trust_remote_code: bool
    given_kind: str
    given_directory: str
    given_digest: str
    output_dir: str
    scratch_dir: str

    @property
    def given(self) -> Artifact:
        """What the stage starts from."""
        return Artifact(kind=self.given_kind, directory=Path(self.given_directory), digest=self.given_digest)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong on one rank, and the exit code that it is worth. ``said_on`` is the host whose console has shown it."""

    rank: int
    exit_code: int
    message: str
    said_on: str | None = None

    @property
    def is_a_stop(self) -> bool:
        """Whether the rank was only asked to stop."""
        return self.exit_code == ExitCode.INTERRUPTED

    def error(self) -> RankFailedError | RankLostError:
        """As the error that ends the leader; without words where the user has them already."""
        if self.said_on == socket.gethostname():
            return RankFailedError("", self.exit_code)
        if self.is_a_stop:
            return RankLostError(
                f"Rank {self.rank}: {self.message}. What is finished is kept; the same command resumes where it stopped."
            )
        return RankFailedError(f"Rank {self.rank} of the job failed. {self.message}", self.exit_code)


class Board:
    """The board of one job. Every method may raise what :func:`is_lost_connection` knows, when the store is gone.

    Args:
        store: the store that the ranks share; its keys are this job's own.
        process: which of the ranks this is.
        pulse: listens for signs of life of the followers; None where their launcher watches them.
        clock: time in seconds.
        sleep: how to pass some.
    """

    def __init__(
        self,
        store: dist.Store,
        process: Process,
        *,
        pulse: Pulse | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.store, self.process, self._pulse = store, process, pulse
        self._clock, self._sleep = clock, sleep

    def naps(self, seconds: float | None = None) -> Iterator[None]:
        """Looks to take until ``seconds`` are over, or for ever, with a nap between each two."""
        start = self._clock()
        yield
        while seconds is None or self._clock() - start < seconds:
            self._sleep(NAP)
            yield

    def put_order(self, number: int, order: Order) -> None:
        """Tell all followers what comes next."""
        self.store.set(f"order/{number}", json.dumps(asdict(order)))

    def next_order(self, number: int) -> Order | None:
        """The order of this number as soon as it is there; None once the leader has ended the job well.

        Raises:
            Dismissed: the leader has ended the job otherwise.
        """
        for _ in self.naps():
            if self.store.check([f"order/{number}"]):
                return Order(**json.loads(self.store.get(f"order/{number}")))
            if self.ended() is not None:
                break
        if not self.ended():
            raise Dismissed
        return None

    def say_ready(self, number: int) -> None:
        """Note that this follower has all it needs for an order."""
        self.store.set(f"ready/{number}/{self.process.rank}", "")

    def await_ready(self, number: int, seconds: float) -> None:
        """Wait until every follower is ready.

        Raises:
            RankFailedError: one of them has failed.
            RankLostError: one of them is not ready in time.
        """
        waiting = self._followers
        for _ in self.naps(seconds):
            waiting = [rank for rank in waiting if not self.store.check([f"ready/{number}/{rank}"])]
            if not waiting:
                return
            self.raise_failure()
        names = ", ".join(map(str, waiting))
        raise RankLostError(
            f"No sign of rank {names} in {seconds:.0f} seconds. What is finished is kept; the same command resumes."
        )

    def put_failure(self, failure: Failure) -> None:
        """Tell the leader what went wrong here; a second time, that it has been said."""
        self.store.set(f"failure/{failure.rank}", json.dumps(asdict(failure)))
        self.store.set(FAILED, "")

    def failure(self) -> Failure | None:
        """What a follower has noted, if any has; an error before one that only says it was stopped."""
        if not self.store.check([FAILED]):
            return None
        notes = [self.store.get(key) for key in map("failure/{}".format, self._followers) if self.store.check([key])]
        return min((Failure(**json.loads(note)) for note in notes), key=lambda failure: (failure.is_a_stop, failure.rank))

    def raise_failure(self) -> None:
        """Raise what a follower has noted, if any has, or that one gives no sign of life."""
        failure = self.failure()
        if failure is not None:
            raise failure.error()
        if self._pulse is not None:
            self._pulse.check()

    def end(self, *, well: bool) -> None:
        """Send the followers away. The first end counts."""
        if self.ended() is None:
            self.store.set(ENDED, "well" if well else "badly")

    def ended(self) -> bool | None:
        """Whether the leader has ended the job well; None while it has not."""
        return self.store.get(ENDED) == b"well" if self.store.check([ENDED]) else None

    def say_goodbye(self) -> None:
        """Note that this follower has seen the end."""
        self.store.set(f"gone/{self.process.rank}", "")

    def await_goodbyes(self, seconds: float) -> None:
        """Give the followers time to see the end: the store may end with this process."""
        for _ in self.naps(seconds):
            if all(self.store.check([f"gone/{rank}"]) for rank in self._followers):
                return

    @property
    def _followers(self) -> list[int]:
        return list(range(1, self.process.world_size))


@cache
def shared_store() -> dist.Store:
    """The store that the launcher's environment names, connected once for all jobs of this process.

    Raises:
        MissingEnvironmentError: there is none.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=TO_CONNECT))
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_lost_connection(error):
            raise
        raise MissingEnvironmentError(
            f"RANK and WORLD_SIZE say that several processes run this job, but they cannot reach each other ({error}). "
            "Start them with torchrun, or set MASTER_ADDR and MASTER_PORT."
        ) from error
    return store


def open_board(process: Process, job: int, environment: Mapping[str, str]) -> Board:
    """The board of the ``job``-th recipe of this command, as the launcher's environment names it."""
    store = dist.PrefixStore(f"bitpress/{attempt(environment)}/job/{job}", shared_store())
    listens = process.is_main and spans_nodes(environment)
    return Board(store, process, pulse=Pulse(store, range(1, process.world_size)) if listens else None)


def attempt(environment: Mapping[str, str]) -> str:
    """Tells a launcher's restarts apart, which may share a store."""
    return environment.get("TORCHELASTIC_RESTART_COUNT", "0")
