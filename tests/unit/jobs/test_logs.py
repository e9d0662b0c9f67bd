import io
import logging
import re
import warnings

import pytest
from datasets import Dataset
from huggingface_hub.utils import tqdm as hub_tqdm
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from algorithms.base import Process
from jobs.logs import EVERY_STEP, Terminal, _Steps, duration, log_failure, logging_to


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


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(total: int, seconds: float, caplog) -> list[str]:
    """The lines of a display whose steps take so many seconds each."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    clock = Clock()
    steps = _Steps("tuning", total, clock)
    for _ in range(total):
        clock.now += seconds
        steps("")
    return caplog.messages


def test_blocks_have_a_line_each_and_thousands_of_steps_one_for_a_hundredth(caplog):
    assert len(lines_of(EVERY_STEP, 0.01, caplog)) == EVERY_STEP
    lines = lines_of(5000, 0.01, caplog)
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, *range(50, 5001, 50)]
    assert lines[1] == "tuning 50/5000 (0.5 s so far, about 49.5 s left)"
    # Where a hundredth takes an hour, there is a line at least every minute or, if they are longer, for every step.
    assert len(lines_of(1000, 360.0, caplog)) == 1000
    lines = lines_of(1000, 20.0, caplog)
    assert [int(line.split()[1].split("/")[0]) for line in lines[:9]] == [1, 4, 7, 10, 13, 16, 19, 20, 23]


def test_the_time_left_knows_of_evaluations_and_of_what_was_done_before():
    clock = Clock()
    steps = _Steps("tuning", 100, clock)
    assert steps.left() == 0.0
    for number in range(1, 41):
        clock.now += 20.0 if number % 10 == 0 else 1.0  # every tenth step is followed by an evaluation
        steps("")
    assert steps.left() == pytest.approx(60 * 2.9)
    clock.now += 100.0
    assert steps.left() == pytest.approx(60 * 2.9 - 100)
    clock.now += 1000.0
    assert steps.left() == 0.0
    resumed = _Steps("calibration", 32, clock)
    for _ in range(16):
        clock.now += 0.01
        resumed("done before")
    for _ in range(2):
        clock.now += 60.0
        resumed("")
    assert resumed.left() == pytest.approx(14 * 60.0)


@pytest.mark.parametrize("interactive", [False, True])
def test_a_display_inside_a_display_shows_both(tmp_path, interactive):
    watched = terminal(interactive)
    with logging_to(tmp_path, Process(), watched) as path, watched.progress("outer", 2) as outer:
        for _ in range(2):
            with watched.progress("inner", 2) as inner:
                inner("a")
                inner("b")
            outer("c")
    written = path.read_text()
    assert [written.count(line) for line in ("inner 1/2: a", "inner 2/2: b", "outer 1/2: c", "outer 2/2: c")] == [2, 2, 1, 1]
    console = watched.messages.file.getvalue()
    assert "outer" in console
    assert "inner" in console


def bars(capsys) -> str:
    """What three libraries draw when they are at work."""
    Dataset.from_list([{"a": 1}, {"a": 2}]).map(lambda row: {"b": row["a"]}, desc="datasets at work")
    for made in (tqdm, hub_tqdm):
        for _ in made(range(3), desc=f"{made.__module__} at work"):
            continue
    return capsys.readouterr().err


def test_bars_of_libraries_are_drawn_only_where_somebody_watches(tmp_path, capsys):
    assert bars(capsys).count("at work") >= 3
    for watched, process, shown in (
        (terminal(), Process(), False),
        (terminal(interactive=True), Process(), True),
        (terminal(interactive=True, quiet=True), Process(), False),
        (terminal(interactive=True), Process(rank=1, world_size=2), False),
    ):
        with logging_to(tmp_path, process, watched):
            assert ("at work" in bars(capsys)) == shown
            with watched.progress("ours", 1):
                assert bars(capsys) == ""
    assert bars(capsys).count("at work") >= 3
