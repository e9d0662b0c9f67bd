"""A disk without room, folders that may not be written, a cache that is gone, too little memory: said, and survived."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.kill import job_of, result

TRACES = ("Traceback", "Logging error")


def assert_said(done, code, *words):
    """The exit code, no traceback, and all of the words."""
    assert done.code == code, done.said[-3000:]
    assert [trace for trace in TRACES if trace in done.said] == []
    last = done.said.strip().splitlines()[-1]
    assert [word for word in words if word not in last] == [], last


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; only root can make one."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], check=False).returncode:
        pytest.skip("a small file system needs root, and the right to mount")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("limit", [2_000, 30_000, 400_000])
def test_a_file_that_may_not_grow_ends_the_job_with_a_sentence(run, tmp_path, limit):
    done = run(tmp_path / "user", limits={"RLIMIT_FSIZE": limit})
    assert_said(done, 3, "File too large", "USER_FOLDER", "the same command resumes")


def test_a_full_disk_ends_the_job_with_a_sentence_and_it_resumes_when_there_is_room(run, small_disk, expected):
    done = run(small_disk / "user", f"CACHE_PATH={small_disk.parent / 'cache'}")
    assert_said(done, 3, "No space left on device", "MB free", "the same command resumes")
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert run(small_disk / "user").code == 0
    assert result(small_disk / "user") == expected


def test_a_disk_that_may_not_be_written_is_named(run, small_disk):
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    folder = small_disk / "user"
    assert run(folder, "STAGES=[calibration]").code == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_said(run(folder), 2, str(folder), "Read-only file system", "USER_FOLDER")
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert run(folder).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is closed to root")
def test_a_closed_folder_is_named(run, finished):
    stage = job_of(finished) / "tmp"
    stage.chmod(0o555)
    (stage / "converted").rename(finished / "away")
    assert_said(run(finished), 2, str(stage), "Permission denied", "USER_FOLDER")
    stage.chmod(0o755)


@pytest.mark.parametrize(
    ("at", "number", "code"), [(90, errno.ENOSPC, 3), (260, errno.EIO, 3), (321, errno.EACCES, 2), (418, errno.EMFILE, 3)]
)
def test_an_operation_that_fails_in_any_stage_ends_the_job_with_a_sentence_and_it_resumes(
    run, tmp_path, expected, at, number, code
):
    folder = tmp_path / "user"
    done = run(folder, watch=str(folder), stop_at=at, fail_with=number)
    assert_said(done, code, str(folder), os.strerror(number), "the same command resumes")
    assert run(folder).code == 0
    assert result(folder) == expected


def test_a_result_that_goes_to_a_folder_with_more_in_it_leaves_the_rest_alone(run, tmp_path):
    home = tmp_path / "home"
    others = [home / name for name in ("tmp/letter.txt", "docs/.letter.partial", "docs/.tmpAbCdEf", "jobs/.log.7.partial")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    short = ["llm.AQLM.finetune_config=null", "EVALUATION=null", "llm.AQLM.save_intermediate_results=false"]
    done = run(tmp_path / "user", f"MODEL_PATH={home}", *short)
    assert done.code == 0, done.said[-3000:]
    assert {path: path.is_file() and path.read_text() for path in others} == dict.fromkeys(others, "mine")
    assert [path.name for path in (home / "tmp").iterdir()] == ["letter.txt"]
    assert (home / "config.json").is_file()


def test_a_folder_of_somebody_elses_is_not_replaced_by_a_stages_result(run, tmp_path):
    letter = tmp_path / "home" / "tmp" / "calibration" / "letter.txt"
    letter.parent.mkdir(parents=True)
    letter.write_text("mine")
    done = run(tmp_path / "user", f"MODEL_PATH={tmp_path / 'home'}")
    assert_said(done, 2, str(letter.parent), "MODEL_PATH")
    assert letter.read_text() == "mine"


@pytest.mark.parametrize("gone", [[".cache", "logs"], ["tmp/tokenized_dataset"], ["tmp"]])
def test_what_can_be_made_again_may_vanish_between_two_runs(run, finished, expected, gone):
    job = job_of(finished)
    for name in gone:
        shutil.rmtree((job if name.startswith("tmp") else finished) / name)
    assert run(finished).code == 0
    found, result_alone = result(finished), {name for name in expected if not name.startswith("tmp/")}
    assert {name: found.get(name) for name in result_alone} == {name: expected[name] for name in result_alone}


@pytest.mark.parametrize("spare", [20_000_000, 100_000_000])
def test_too_little_memory_names_what_helps_and_the_job_resumes(run, tmp_path, expected, spare):
    done = run(tmp_path / "user", spare=spare)
    assert done.code == 4, done.said[-3000:]
    assert "Traceback" not in done.said
    assert "ran out of memory" in done.said
    assert "llm.AQLM." in done.said.strip().splitlines()[-1]
    if spare > 50_000_000:  # enough to come to the evaluation
        assert run(tmp_path / "user").code == 0
        assert result(tmp_path / "user") == expected
