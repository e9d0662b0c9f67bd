import io
import logging
import re
import warnings

import pytest
from rich.console import Console
from rich.table import Table

from algorithms.base import Process
from jobs.logs import Terminal, duration, log_failure, logging_to


def terminal(interactive=False, quiet=False):
    return Terminal(
        quiet=quiet,
        messages=Console(file=io.StringIO(), force_terminal=interactive, width=200),
        results=Console(file=io.StringIO(), force_terminal=interactive, width=200),
    )


def test_the_log_has_the_documented_format_on_file_and_console(tmp_path):
    watched = terminal()
    with logging_to(tmp_path / "deep" / "logs", Process(), watched) as path:
        logging.getLogger("jobs.somewhere").info("hello %s", "there")
        warnings.warn("an old call", stacklevel=1)
    logging.getLogger("jobs.somewhere").warning("after the end")
    assert path == tmp_path / "deep" / "logs" / "log.log"
    lines = path.read_text().splitlines()
    pattern = r"\d\d/\d\d/\d{4} \d\d-\d\d-\d\d - INFO - jobs\.somewhere - hello there"
    assert re.fullmatch(pattern, lines[0])
    assert "an old call" in path.read_text()
    assert "after the end" not in path.read_text()
    assert watched.messages.file.getvalue().splitlines()[0] == lines[0]


def test_handlers_and_levels_are_given_back(tmp_path):
    root = logging.getLogger()
    before = (list(root.handlers), root.level, logging.getLogger("transformers").level)
    with logging_to(tmp_path, Process(), terminal()):
        assert logging.getLogger("transformers").level == logging.WARNING
    assert (list(root.handlers), root.level, logging.getLogger("transformers").level) == before


def test_a_failure_goes_to_the_file_with_its_traceback_and_not_to_the_console(tmp_path):
    watched = terminal()
    with logging_to(tmp_path, Process(), watched) as path:
        try:
            raise ValueError("it broke")
        except ValueError as error:
            log_failure(error)
    assert "Traceback" in path.read_text()
    assert "it broke" in path.read_text()
    assert watched.messages.file.getvalue() == ""


def test_other_ranks_write_their_own_file_and_stay_off_the_console(tmp_path):
    watched = terminal()
    with logging_to(tmp_path, Process(rank=2, world_size=4), watched) as path:
        logging.getLogger("x").info("rank two")
    assert path.name == "rank_2.log"
    assert "rank two" in path.read_text()
    assert watched.messages.file.getvalue() == ""


@pytest.mark.parametrize("interactive", [False, True])
def test_progress_is_a_bar_on_a_terminal_and_a_line_a_step_elsewhere(tmp_path, interactive):
    watched = terminal(interactive)
    with logging_to(tmp_path, Process(), watched) as path, watched.progress("calibration", 3) as step:
        for block in range(3):
            step(f"block {block}")
    written = path.read_text()
    assert [f"calibration {n}/3: block {n - 1}" in written for n in (1, 2, 3)] == [True] * 3
    console = watched.messages.file.getvalue()
    assert ("calibration 2/3: block 1 (" in console) != interactive
    assert ("━" in console) == interactive


def test_results_are_drawn_on_a_terminal_and_plain_elsewhere():
    table = Table("a")
    for interactive in (False, True):
        watched = terminal(interactive)
        watched.show(table, "plain [text]")
        assert ("plain [text]" in watched.results.file.getvalue()) != interactive


@pytest.mark.parametrize(("seconds", "said"), [(4.23, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (0, "0.0 s")])
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("interactive", [False, True])
def test_a_quiet_terminal_has_warnings_and_results_and_the_file_has_all(tmp_path, interactive):
    watched = terminal(interactive, quiet=True)
    with logging_to(tmp_path, Process(), watched) as path, watched.progress("calibration", 2) as step:
        step("first")
        logging.getLogger("x").info("hello")
        logging.getLogger("x").warning("look out")
    watched.show("the result", "the result")
    console = watched.messages.file.getvalue()
    assert len(console.strip().splitlines()) == 1
    assert "look out" in console
    assert all(words in path.read_text() for words in ("calibration 1/2: first", "hello", "look out"))
    assert "the result" in watched.results.file.getvalue()
