"""Running other programs: their words while they run, their end, and an end that we bring about."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from algorithms.base import StageError
from algorithms.engines.tensorrt_llm.programs import require, run_program
from configs.errors import MissingEnvironmentError
from tests.unit.algorithms.engines.fake_programs import executable

PATIENCE = 20.0


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_a_program_writes_is_in_the_log_while_it_runs(tmp_path):
    text = (
        "import os, sys, time\nprint('out', os.getcwd(), sys.argv[1], flush=True)\nprint('err', file=sys.stderr, flush=True)\n"
        "while not os.path.exists('go'): time.sleep(0.02)\nprint('done')\n"
    )
    script = executable(tmp_path / "script.py", text)
    (tmp_path / "work").mkdir()
    command, log = (sys.executable, str(script), "a b; echo c"), tmp_path / "log"
    thread = threading.Thread(target=run_program, args=(command, log), kwargs={"working_dir": tmp_path / "work"})
    thread.start()
    try:
        assert wait_for(lambda: log.is_file() and "err" in log.read_text()), "not before the program ends"
        assert "done" not in log.read_text()
    finally:
        (tmp_path / "work" / "go").touch()
        thread.join()
    first, *said = log.read_text().splitlines()
    assert first == f"$ {sys.executable} {script} 'a b; echo c'"
    assert said == [f"out {tmp_path / 'work'} a b; echo c", "err", "done"]


def test_a_failure_says_which_command_with_its_last_lines_and_the_log(tmp_path):
    script = executable(tmp_path / "script.py", "for n in range(30): print('line', n)\nraise SystemExit(7)\n")
    with pytest.raises(StageError) as caught:
        run_program((sys.executable, str(script), "--x", "1"), tmp_path / "log", working_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{sys.executable} {script} --x 1\nended with exit code 7.")
    assert str(tmp_path / "log") in message
    assert "line 29" in message
    assert "line 17\n" not in message
    assert len((tmp_path / "log").read_text().splitlines()) == 31


def test_a_program_that_is_killed_says_by_what(tmp_path):
    script = executable(tmp_path / "script.py", "import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(StageError, match=r"was ended by SIGKILL.*\n  nothing"):
        run_program((sys.executable, str(script)), tmp_path / "log", working_dir=tmp_path)


def test_a_program_ends_with_this_one_and_so_do_its_workers(tmp_path):
    text = (
        "import os, subprocess, sys, time\nworker = subprocess.Popen(['sleep', '60'])\n"
        "open('started.part', 'w').write(f'{os.getpid()} {worker.pid}')\nos.rename('started.part', 'started')\ntime.sleep(60)\n"
    )
    script, started = executable(tmp_path / "script.py", text), tmp_path / "started"

    def stop():
        wait_for(started.is_file)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_program((sys.executable, str(script)), tmp_path / "log", working_dir=tmp_path)
    thread.join()
    pids = [int(word) for word in started.read_text().split()]
    assert len(pids) == 2
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_all_that_is_missing_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(executable(tmp_path / "bin" / "here", "").parent))
    (tmp_path / "file").touch()
    require(["here"], [tmp_path / "file"], "unsaid")
    with pytest.raises(MissingEnvironmentError) as caught:
        require(["here", "absent"], [tmp_path / "file", tmp_path / "none"], "Install it.")
    assert str(caught.value) == f"absent is not on the PATH; {tmp_path / 'none'} is not there. Install it."
