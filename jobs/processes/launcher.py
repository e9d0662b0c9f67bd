"""Starts the ranks of a job on this machine, waits for them, and says as one process how they ended."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from uuid import uuid4

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from configs.errors import ExitCode, RankFailedError, RankLostError
from jobs.execution.interruption import JobInterrupted
from jobs.processes.environment import set_for_ranks

HANDLED = "SIGTERM,SIGINT"  # not SIGHUP: a job under nohup goes on
SECONDS_TO_END = 20  # for ranks that were asked to stop, before they are killed
LOOPBACK = "127.0.0.1"
USERS_CODES = (ExitCode.RECIPE, ExitCode.ENVIRONMENT, ExitCode.OUT_OF_MEMORY, ExitCode.CERTIFICATE, ExitCode.UPLOAD)


def start_ranks(count: int, command: Sequence[str]) -> None:
    """Run ``python COMMAND`` as ``count`` ranks to their end. What they write reaches the console as it is.

    Raises:
        JobInterrupted: this process was asked to stop; the ranks have ended.
        RankLostError: a rank was killed.
        RankFailedError: a rank ended with an error, which it has said itself.
    """
    with TemporaryDirectory(prefix="bitpress_ranks_") as folder, set_for_ranks(count), _quiet(), _signals_given_back():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{LOOPBACK}:0",
            local_addr=LOOPBACK,
            max_restarts=0,
            signals_to_handle=HANDLED,
            shutdown_timeout=SECONDS_TO_END,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            # The launcher puts its own values for ${...}; a doubled dollar is one that it leaves alone.
            elastic_launch(config, sys.executable)(*(word.replace("$", "$$") for word in command))
        except SignalException as error:
            raise JobInterrupted(f"stopped by {error.sigval.name}") from error
        except ChildFailedError as error:
            raise how_it_ended({rank: failure.exitcode for rank, failure in error.failures.items()}) from error


def how_it_ended(exit_codes: Mapping[int, int]) -> BaseException:
    """The one error that stands for those of all ranks.

    Args:
        exit_codes: rank -> its exit code, negative for a signal, in the order in which they ended; the ranks that the launcher
            stopped for it come last.
    """
    for code in USERS_CODES:
        if code in exit_codes.values():
            return RankFailedError("", code)
    rank, code = next(iter(exit_codes.items()))
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (by the system, if memory was short and nobody else did it)" if -code == signal.SIGKILL else ""
        return RankLostError(
            f"Rank {rank} of the job was killed by {name}{hint}. What is finished is kept; the same command resumes."
        )
    if code == ExitCode.INTERRUPTED and all(other in (code, -signal.SIGTERM, -signal.SIGKILL) for other in exit_codes.values()):
        return JobInterrupted(f"rank {rank} was stopped")
    return RankFailedError("", ExitCode.FAILED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the launcher's own log lines off the console: the ranks' messages say what there is to say."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _signals_given_back() -> Iterator[None]:
    """The launcher takes these signals and does not give them back."""
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
