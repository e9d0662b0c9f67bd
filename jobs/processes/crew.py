"""Rank 0's side of a job on several processes: it orders stages, and knows what a broken connection means."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from algorithms.base import Process
from algorithms.parallel.ranks import Ranks
from configs.errors import RankFailedError, RankLostError
from jobs.execution.interruption import ignore_stops
from jobs.processes.board import Board, Failure, Order, attempt, open_board, shared_store
from jobs.processes.connection import is_lost_connection
from jobs.processes.group import opened_group
from jobs.processes.this_process import process_from_environment

logger = logging.getLogger(__name__)

SECONDS_TO_GET_READY = 1800  # for followers to read the tokens
SECONDS_FOR_WORDS = 3  # for a rank that ended to have said why
SECONDS_FOR_GOODBYES = 3


class Crew:
    """The ranks of one job as their leader sees them; used as a context manager around the job.

    Args:
        process: this process, rank 0.
        board: where the ranks leave notes; None for a process alone.
    """

    def __init__(self, process: Process | None = None, board: Board | None = None) -> None:
        self.process, self._board = process or Process(), board
        self._orders = 0
        self._guard = _Guard(board)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self._board is None else self.process.world_size

    @contextmanager
    def stage(self, order: Order, device: torch.device) -> Iterator[Ranks]:
        """All ranks as one group, the followers at work on the same stage.

        Raises:
            RankFailedError: a follower met an error.
            RankLostError: a follower is gone.
        """
        if self._board is None:
            yield Ranks(device=device)
            return
        self._orders += 1
        with self._guard:
            self._board.put_order(self._orders, order)
            self._board.await_ready(self._orders, SECONDS_TO_GET_READY)
            store = dist.PrefixStore(f"group/{self._orders}", self._board.store)
            with opened_group(store, self.process, device, self._board.raise_failure) as ranks, self._guard:
                yield ranks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._board is None:
            return
        try:
            with _store_may_be_gone():
                self._board.end(well=kind is None)
                self._board.await_goodbyes(0 if self._guard.lost else SECONDS_FOR_GOODBYES)
        finally:
            self._guard.undo()


class _Guard:
    """Sends the followers away before a group closes on an error, and finds the words for a connection that broke.

    May be entered several times at once; the innermost has its say.
    """

    def __init__(self, board: Board | None) -> None:
        self._board = board
        self.lost = False
        self.undo: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or self._board is None:
            return
        try:
            if isinstance(error, KeyboardInterrupt):
                # A launcher stops the other ranks when one has failed: the failure is what the user should hear of.
                failure = self._failure()
                if failure is not None and not failure.is_a_stop:
                    raise failure.error()
            elif is_lost_connection(error) and not isinstance(error, RankLostError | RankFailedError):
                self.undo = ignore_stops()  # the launcher stops the ranks that are left, which the end of the job does as well
                raise self._explanation(error) from error
        finally:
            with _store_may_be_gone():
                self._board.end(well=False)

    def _explanation(self, error: BaseException) -> RankLostError | RankFailedError:
        """Why a connection broke: what a follower has noted, or else that nobody knows."""
        assert self._board is not None
        for _ in self._board.naps(SECONDS_FOR_WORDS):
            failure = self._failure()
            if failure is not None:
                return failure.error()
        self.lost = True
        return RankLostError(
            f"Another rank of the job is gone, or does not answer ({_words(error)}). What is finished is kept; "
            "the same command resumes."
        )

    def _failure(self) -> Failure | None:
        assert self._board is not None
        with _store_may_be_gone():
            return self._board.failure()
        return None


@contextmanager
def _store_may_be_gone() -> Iterator[None]:
    """Pass over a store that went down with the process that held it."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        logger.debug("The other ranks cannot be reached any more: %s", error)


def open_crew(environment: Mapping[str, str] = os.environ) -> Crew:
    """The crew of the next job of this command, as the launcher's environment names its ranks."""
    process = process_from_environment(environment)
    if process.world_size == 1:
        return Crew(process)
    job = int(shared_store().add(f"bitpress/{attempt(environment)}/jobs", 1))
    return Crew(process, open_board(process, job, environment))


def _words(error: BaseException) -> str:
    """The first sentence of an error, without the place in the source that torch puts before it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^\]]*\]\s*", "", line).split(". ")[0][:200]
