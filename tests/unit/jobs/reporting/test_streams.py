"""Nobody reads any more: said once, and no end of the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.logs import Terminal
from jobs.reporting.streams import Steady, write_all
from tests.faults.warm_process import ROOT


@pytest.fixture
def broken():
    """A text stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def test_what_can_be_written_is(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        assert write_all(stream, "one ") is None
        Steady(stream).write("two")
    assert (tmp_path / "out").read_text() == "one two"


def test_a_reader_that_is_gone_is_reported_and_the_stream_closes_in_peace(broken):
    assert isinstance(write_all(broken, "x"), BrokenPipeError)
    assert write_all(broken, "x") is None, "it leads to nowhere now"


def test_a_process_without_a_stream_has_nothing_to_write_to():
    assert write_all(None, "x") is None


def test_a_job_goes_on_without_its_terminal(broken, monkeypatch):
    monkeypatch.setattr(sys, "stderr", broken)
    monkeypatch.setattr(sys, "stdout", broken)
    terminal = Terminal()
    terminal.show("x", "x")
    terminal.messages.out("x\n" * 50_000)  # more than its buffer takes
    assert Path(f"/proc/self/fd/{broken.fileno()}").readlink() == Path(os.devnull)


@pytest.mark.parametrize(("words", "code"), [(["ls"], 3), (["validate", "--yaml_path", "/none.yaml"], 2)])
def test_a_command_keeps_its_exit_code_where_its_output_is_full(words, code):
    words = [sys.executable, "main.py", *words]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=full if code == 2 else subprocess.PIPE, check=False)
    assert done.returncode == code
    assert done.stderr is None or done.stderr.decode() == "The answer cannot be written: No space left on device.\n"
