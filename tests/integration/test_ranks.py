"""One job on two processes, for real: how they start, what they share, and what each way of ending looks like from outside."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fake_job import job_dir, journal, manifest, run
from tests.support.ranks.fake_program import PROGRAM, write_recipe

CALIBRATED = ["calibration 0", "calibration 1", "calibration 2"]
TWO = {"NUM_PROCESSES": 2}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def start(folder: Path, *launcher: str, words: tuple[str, ...] = ()) -> subprocess.Popen:
    """The recipe below ``folder``, as its users start it; ``words`` go before the options."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *launcher, str(PROGRAM), *words, "--yaml_path", str(folder / "recipe.yaml")],
        env=kept | {"FAKE_FOLDER": str(folder), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def waiting(folder: Path, count: int, process: subprocess.Popen) -> dict[int, int]:
    """Rank -> process, of the ranks that have come to their waiting place."""
    deadline = time.monotonic() + 60
    found = {}
    while len(found) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the ranks never came to their waiting place"
        time.sleep(0.05)
        lines = (folder / "journal.txt").read_text().splitlines() if (folder / "journal.txt").exists() else []
        found = {int(line.split()[1]): int(line.split()[2]) for line in lines if line.startswith("waiting")}
    return found


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def status(folder: Path) -> tuple[str, str]:
    found = manifest(folder)
    return found["stages"]["finetune"]["status"], found["run"]["status"]


def test_a_job_starts_its_own_ranks_and_shares_its_stage_out(tmp_path):
    write_recipe(tmp_path, TWO, texts=["wikitext2", "gsm8k:5"])
    process = start(tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("method") == 1
    assert "gsm8k:5 is a task" in errors
    assert journal(tmp_path) == [*CALIBRATED, "finetune 2", "conversion"], "the rest is rank 0's alone"
    assert manifest(tmp_path)["versions"]["processes"] == 2
    assert manifest(tmp_path)["versions"]["threads"] == 1
    lines = [json.loads(line) for line in (job_dir(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [line["wikitext2"] > 1 for line in lines if "wikitext2" in line] == [True], "one rank writes"
    logs = tmp_path / "user_data" / "logs" / "Kompress" / "one"
    assert "Stage finetune: finished" in (logs / "rank_1.log").read_text()

    result = run(tmp_path, tunes=True, shared=True, texts=["wikitext2", "gsm8k:5"])
    assert journal(tmp_path) == [], "keys do not know how many processes there were"
    assert not result.plan.runs


def test_torchrun_starts_the_ranks_of_several_recipes(tmp_path):
    write_recipe(tmp_path, {"NUM_PROCESSES": 3})
    second = write_recipe(tmp_path, {"NUM_PROCESSES": 3, "JOB_ID": "two"}, name="second.yaml")
    process = start(tmp_path, *TORCHRUN, words=("run", "--yaml_path", str(second)))
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert errors.count("NUM_PROCESSES: 3 is ignored: the launcher has set WORLD_SIZE=2") == 2
    assert journal(tmp_path) == 2 * [*CALIBRATED, "finetune 2", "conversion"]


def test_losing_a_rank_ends_the_job_with_a_sentence_and_the_next_run_resumes(tmp_path):
    write_recipe(tmp_path, TWO, trouble="1:wait")
    process = start(tmp_path)
    ranks = waiting(tmp_path, 1, process)
    begin = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 60
    assert process.returncode == 75
    assert errors.count("Rank 1 of the job was killed by SIGKILL") == errors.count("the same command resumes") == 1
    assert "Traceback" not in errors
    assert status(tmp_path) == ("interrupted", "interrupted")
    journal(tmp_path)
    run(tmp_path, tunes=True, shared=True)
    assert journal(tmp_path) == ["finetune 1", "conversion"], "what was finished is kept"
    assert status(tmp_path) == ("finished", "finished")
    assert manifest(tmp_path)["stages"]["finetune"]["attempts"] == 2


def test_a_stop_signal_ends_all_ranks_tidily(tmp_path):
    write_recipe(tmp_path, TWO, trouble="*:wait")
    process = start(tmp_path)
    ranks = waiting(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert errors.count("Interrupted; what is finished is kept. To resume:") == 1
    assert "Traceback" not in errors
    assert not any(is_alive(pid) for pid in ranks.values())
    assert status(tmp_path) == ("interrupted", "interrupted")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_is_said_once_and_gives_the_exit_code(tmp_path, rank):
    write_recipe(tmp_path, TWO, trouble=f"{rank}:data")
    process = start(tmp_path)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 2
    assert errors.count(f"DATA_PATH: rank {rank} cannot read it") == 1
    assert "Traceback" not in errors
    assert status(tmp_path) == ("failed", "failed")


def test_under_torchrun_an_unexpected_error_of_a_follower_shows_its_traceback(tmp_path):
    write_recipe(tmp_path, trouble="1:bug")
    process = start(tmp_path, *TORCHRUN)
    errors = process.communicate(timeout=90)[1]
    assert process.returncode == 1
    assert len(re.findall(r"^.*ZeroDivisionError: a bug on rank 1$", errors, re.MULTILINE)) == 1
    assert status(tmp_path) == ("failed", "failed")
