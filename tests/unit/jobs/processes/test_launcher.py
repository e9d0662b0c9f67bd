import logging
import signal

import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from configs.errors import ExitCode, RankFailedError, RankLostError, exit_code
from jobs.execution.interruption import JobInterrupted
from jobs.processes import launcher
from jobs.processes.launcher import how_it_ended, start_ranks


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({1: 2, 0: 2}, ExitCode.RECIPE, ""),
        ({1: 75, 0: 3}, ExitCode.ENVIRONMENT, ""),
        ({1: 4, 0: -15}, ExitCode.OUT_OF_MEMORY, ""),
        ({0: 5}, ExitCode.CERTIFICATE, ""),
        ({0: 1, 1: -15}, ExitCode.FAILED, ""),
        ({1: 1, 0: 75}, ExitCode.FAILED, ""),
        ({1: -9, 0: 75}, ExitCode.INTERRUPTED, "Rank 1 of the job was killed by SIGKILL (by the system"),
        ({0: -11, 1: -15}, ExitCode.INTERRUPTED, "Rank 0 of the job was killed by SIGSEGV. What is finished"),
        ({1: 75, 0: -15}, ExitCode.INTERRUPTED, "rank 1 was stopped"),
        ({0: 75, 1: 75}, ExitCode.INTERRUPTED, "rank 0 was stopped"),
        ({0: 75, 1: 1}, ExitCode.FAILED, ""),
    ],
)
def test_the_ranks_exit_codes_become_one_error(codes, code, said):
    error = how_it_ended(codes)
    assert exit_code(error) == code
    assert str(error).startswith(said)
    assert bool(str(error)) == bool(said)


class Elastic:
    """Stands in for torch's launcher: keeps what it was asked for, and ends as it is told to."""

    def __init__(self, ending=None):
        self.ending = ending

    def __call__(self, config, program):
        self.config = config
        return self.launch

    def launch(self, *command):
        self.command = command
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the real one takes it, too
        if self.ending is not None:
            raise self.ending


def test_the_ranks_run_the_same_program_on_one_machine_without_restarts(monkeypatch):
    elastic = Elastic()
    monkeypatch.setattr(launcher, "elastic_launch", elastic)
    before = signal.getsignal(signal.SIGTERM)
    start_ranks(3, ["main.py", "--yaml_path", "r.yaml", "JOB_ID=${MODEL}"])
    assert elastic.command == ("main.py", "--yaml_path", "r.yaml", "JOB_ID=$${MODEL}")
    assert (elastic.config.nproc_per_node, elastic.config.max_nodes, elastic.config.max_restarts) == (3, 1, 0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert logging.root.manager.disable == 0


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (SignalException("", sigval=signal.SIGTERM), JobInterrupted),
        (ChildFailedError("x", {1: ProcessFailure(local_rank=1, pid=1, exitcode=-9, error_file="")}), RankLostError),
        (ChildFailedError("x", {0: ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="")}), RankFailedError),
    ],
)
def test_the_launchers_errors_become_ours(monkeypatch, ending, kind):
    monkeypatch.setattr(launcher, "elastic_launch", Elastic(ending))
    with pytest.raises(kind):
        start_ranks(2, ["main.py"])
