"""The other ranks' side of a job on several processes: they work on the stages that rank 0 orders, and nothing else."""

from __future__ import annotations

import logging
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from algorithms.base import StageContext, StageSpec
from configs.errors import ExitCode, RankFailedError, RankLostError, exit_code
from configs.loader import LoadedRecipe
from jobs.execution.collaborators import Collaborators
from jobs.execution.memory import naming_remedies
from jobs.execution.preparation import build_algorithm
from jobs.execution.stage import run_spec
from jobs.execution.stage_texts import evaluation_on
from jobs.logs import log_failure, logging_to
from jobs.processes import this_process
from jobs.processes.board import Board, Dismissed, Failure, Order, open_board
from jobs.processes.connection import is_lost_connection
from jobs.processes.group import opened_group
from jobs.processes.pulse import beating, spans_nodes
from jobs.reporting.library_bars import library_bars_off
from jobs.workspace import open_workspace

logger = logging.getLogger(__name__)

SECONDS_FOR_THE_LEADER = 3  # to say a follower's error; after that the follower says it itself
SECONDS_FOR_WORDS = 5  # for the leader to have ended the job where a connection broke


def follow(loaded: LoadedRecipe, job: int, *, parts: Collaborators | None = None, board: Board | None = None) -> bool:
    """Work on what rank 0 orders until it ends the job.

    Args:
        loaded: the recipe.
        job: which of the recipes of this command it is, from 1.
        parts: what stages are run with.
        board: where orders are found; the launcher's by default.

    Returns:
        Whether the job ended well; if not, the leader has said why.

    Raises:
        RankLostError: the leader is gone.
        RankFailedError: this rank met an error, which the leader has said.
    """
    board = board or open_board(this_process.process_from_environment(), job, os.environ)
    parts = parts or Collaborators()
    try:
        with _silent(), _signs_of_life(board), _Report(board) as report:
            _work(loaded, parts, board, report)
    except Dismissed:
        well = False
    else:
        well = True
    with suppress(RuntimeError):  # the leader waits for this as long as it can
        board.say_goodbye()
    return well


def _work(loaded: LoadedRecipe, parts: Collaborators, board: Board, report: _Report) -> None:
    first = board.next_order(1)
    if first is None:
        return
    # Only now: an order says that the leader holds the job and has made its folders.
    this_process.apply_visible_devices(loaded.recipe.cuda_id)
    workspace = open_workspace(loaded.recipe)
    with logging_to(workspace.logs_dir, board.process, parts.terminal):
        process = board.process
        logger.info("Rank %d of %d, process %d on %s", process.rank, process.world_size, os.getpid(), socket.gethostname())
        algorithm, number, order = build_algorithm(loaded, parts), 1, first
        specs = {spec.name: spec for spec in algorithm.stages()}
        while order is not None:
            with report:
                _take_part(loaded, parts, board, report, specs[order.stage], order, number)
            number += 1
            order = board.next_order(number)


def _take_part(
    loaded: LoadedRecipe,
    parts: Collaborators,
    board: Board,
    report: _Report,
    spec: StageSpec,
    order: Order,
    number: int,
) -> None:
    """One stage, in step with the other ranks."""
    source = parts.open_model(Path(order.model_directory), order.model_name, order.trust_remote_code)
    workspace, device = open_workspace(loaded.recipe), this_process.choose_device(board.process)
    with naming_remedies(loaded):
        tokens = None if spec.tokens is None else parts.load_tokens(loaded.recipe, spec.tokens, source, workspace)
    board.say_ready(number)
    store = dist.PrefixStore(f"group/{number}", board.store)
    with opened_group(store, board.process, device, report.raise_dismissal) as ranks, report, naming_remedies(loaded):
        logger.info("Stage %s: takes part on %s", spec.name, device)
        context = StageContext(
            source=source,
            tokens=tokens.train if tokens else (),
            validation_tokens=tokens.validation if tokens else (),
            output_dir=Path(order.output_dir),
            scratch_dir=Path(order.scratch_dir),
            device=device,
            seed=spec.tokens.seed if spec.tokens else 0,
            metrics=lambda values: None,
            progress=_no_progress,
            ranks=ranks,
            evaluate=evaluation_on(spec, ranks.from_main({}), parts) if spec.evaluates else None,
        )
        run_spec(spec, context, order.given)
    logger.info("Stage %s: finished", spec.name)


class _Report:
    """Tells the leader of an error of this rank, before the group closes, and finds out who is to tell the user.

    May be entered several times at once: the innermost posts the error, the outermost waits whether the leader hears of it.
    """

    def __init__(self, board: Board) -> None:
        self._board, self._depth = board, 0
        self._posted: Failure | None = None

    def __enter__(self) -> Self:
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._depth -= 1
        if error is None or isinstance(error, Dismissed):
            return
        try:
            if self._posted is None:
                self._post(error)
            if self._depth == 0 and isinstance(error, KeyboardInterrupt):
                self._board.say_goodbye()
            elif self._depth == 0 and not isinstance(error, RankLostError):
                self._leave_the_word_to_the_leader(error)
        except RuntimeError as problem:
            if not is_lost_connection(problem):
                raise
            raise RankLostError("The leader of the job is gone.") from error

    def raise_dismissal(self) -> None:
        """Raise where the leader has ended the job."""
        if self._board.ended() is not None:
            raise Dismissed

    def _post(self, error: BaseException) -> None:
        if isinstance(error, RankLostError):
            return
        if is_lost_connection(error):
            for _ in self._board.naps(SECONDS_FOR_WORDS):
                self.raise_dismissal()
            raise RankLostError("The connection to the other ranks broke.") from error
        self.raise_dismissal()
        log_failure(error)
        code = exit_code(error)
        if code == ExitCode.FAILED:
            message = "It has no explanation but this:\n" + "".join(traceback.format_exception(error))
        else:
            message = str(error) or type(error).__name__
        self._posted = Failure(rank=self._board.process.rank, exit_code=code, message=message)
        self._board.put_failure(self._posted)

    def _leave_the_word_to_the_leader(self, error: BaseException) -> None:
        """Wait until it has heard; one that waits for this rank in a collective hears only when this process is gone."""
        assert self._posted is not None
        for _ in self._board.naps(SECONDS_FOR_THE_LEADER):
            if self._board.ended() is not None:
                self._board.say_goodbye()
                raise RankFailedError("", exit_code(error)) from error
        self._board.put_failure(replace(self._posted, said_on=socket.gethostname()))


def _signs_of_life(board: Board) -> AbstractContextManager[None]:
    return beating(board.store, board.process.rank) if spans_nodes(os.environ) else nullcontext()


@contextmanager
def _no_progress(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """Progress is rank 0's to show."""
    yield lambda note: None


@contextmanager
def _silent() -> Iterator[None]:
    """Keep warnings and progress bars of libraries off the console, which is rank 0's."""
    nowhere = logging.NullHandler()  # without any handler, logging writes warnings to the error stream
    logging.getLogger().addHandler(nowhere)
    try:
        with warnings.catch_warnings(), library_bars_off():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(nowhere)
