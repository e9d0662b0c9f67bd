import fcntl
import json
import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from configs.errors import DataError
from jobs.results.artifacts import clear_results
from jobs.workspace import JobLock, JobLockedError, check_name, inside, open_workspace
from tests.support.envelopes import envelope

ROOT = Path(__file__).resolve().parents[3]


def workspace(tmp_path, **keys):
    return open_workspace(envelope(tmp_path / "user", **keys))


def test_the_layout_of_a_job(tmp_path):
    found = workspace(tmp_path, JOB_SERVICE="KomPress", JOB_ID=7)
    user = tmp_path / "user"
    job = user / "jobs" / "KomPress" / "7"
    assert found.job_dir == job
    assert found.logs_dir == user / "logs" / "KomPress" / "7"
    assert found.logs_dir == user / "logs" / "KomPress" / "7"
    assert (found.cache_dir, found.models_dir, found.datasets_dir) == (user / ".cache", user / "models", user / "datasets")
    assert found.stage_dir("calibration") == job / "tmp" / "calibration"
    assert found.partial_dir("calibration") == job / "tmp" / ".calibration.partial"
    assert found.scratch_dir("calibration").parent == job / "tmp"
    assert found.tokens_dir == job / "tmp" / "tokenized_dataset"
    assert {found.manifest_path.name, found.metrics_path.name, found.recipe_path.name} == {
        "manifest.json",
        "metrics.jsonl",
        "recipe.yaml",
    }
    assert not user.exists()


def test_explicit_paths_are_the_users_own(tmp_path):
    found = workspace(
        tmp_path, MODEL_PATH=str(tmp_path / "m"), LOGGING_PATH=str(tmp_path / "l"), CACHE_PATH=str(tmp_path / "c")
    )
    assert (found.job_dir, found.logs_dir, found.cache_dir) == (tmp_path / "m", tmp_path / "l", tmp_path / "c")


def test_relative_folders_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_workspace(envelope(Path("user_data"))).job_dir == tmp_path / "user_data" / "jobs" / "Kompress" / "job"


def test_create_makes_the_folders_and_the_old_spelling(tmp_path):
    found = workspace(tmp_path)
    found.create()
    found.create()
    (found.stage_dir("calibration")).mkdir()
    (found.stage_dir("calibration") / "0.safetensors").write_text("x")
    assert (found.tmp_dir / "caliberation" / "0.safetensors").read_text() == "x"
    assert (found.tmp_dir / "caliberation").readlink() == Path("calibration")  # relative: the job folder can be moved
    assert found.models_dir.is_dir()


def test_a_folder_of_the_old_spelling_is_left_alone(tmp_path):
    found = workspace(tmp_path)
    (found.tmp_dir / "caliberation").mkdir(parents=True)
    found.create()
    assert not (found.tmp_dir / "caliberation").is_symlink()


def test_a_folder_that_cannot_be_made_names_the_key(tmp_path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "jobs").write_text("a file")
    with pytest.raises(DataError, match=r"jobs/Kompress/job: the folder cannot be made .* USER_FOLDER or MODEL_PATH"):
        workspace(tmp_path).create()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "~/x", "", ".", "a\\..\\x", "a\nb"])
def test_names_that_lead_out_are_refused(name):
    with pytest.raises(DataError, match=r"JOB_ID=.* is not a name inside the user folder"):
        check_name(name, "JOB_ID")


def test_links_that_lead_out_are_refused_and_a_linked_base_is_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "evil").symlink_to(elsewhere)
    with pytest.raises(DataError, match=f"a link that leads out of .*, to {elsewhere}"):
        inside(tmp_path / "jobs", "evil/job", "JOB_ID")
    (tmp_path / "linked").symlink_to(elsewhere)
    assert inside(tmp_path / "linked", "Kompress/job", "JOB_ID") == tmp_path / "linked" / "Kompress" / "job"


HOLDER = """
    import sys, time
    from pathlib import Path
    from jobs.workspace import JobLock, open_workspace
    from tests.support.envelopes import envelope
    with JobLock(open_workspace(envelope(Path(sys.argv[1])))):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A second process that holds the job's lock."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "user")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_job_and_a_killed_one_holds_nothing(tmp_path, holder):
    found = workspace(tmp_path)
    with pytest.raises(JobLockedError, match=f"process {holder.pid} on {socket.gethostname()} since 20"), JobLock(found):
        pass
    holder.kill()
    holder.wait()
    assert found.lock_path.exists()
    with JobLock(found):
        assert json.loads(found.lock_path.read_text())["pid"] == os.getpid()


def test_the_lock_leaves_nothing_behind_and_can_be_taken_again(tmp_path):
    found = workspace(tmp_path)
    for _ in range(2):
        with JobLock(found), pytest.raises(JobLockedError, match="already running"), JobLock(found):
            pass
    assert list(found.job_dir.iterdir()) == []
    with pytest.raises(RuntimeError, match="inside"), JobLock(found):
        raise RuntimeError("inside")
    with JobLock(found):
        assert found.lock_path.exists()


def test_other_jobs_are_not_locked(tmp_path):
    with JobLock(workspace(tmp_path, JOB_ID="a")), JobLock(workspace(tmp_path, JOB_ID="b")) as second:
        assert second is not None


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path):
    here = workspace(tmp_path)
    here.create()
    job, tmp = here.job_dir, here.tmp_dir
    kept = [job / "config.json", tmp / ".calibration.partial" / "0.json", tmp / ".calibration.partial" / ".key.json"]
    gone = [
        job / ".manifest.json.12.partial",
        tmp / ".calibration.partial" / ".0.safetensors.12.partial",
        job / ".README.md.partial",
    ]
    gone += [tmp / "tokenized_dataset" / ".abc.12.partial" / "tokens.safetensors", tmp / ".calibration.replaced" / "0.json"]
    for path in [*kept, *gone]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (job / "a link").symlink_to(tmp_path / "nowhere")
    half = job / "tmp" / ".calibration.partial" / ".tmpj6k6Pf"  # of safetensors
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_text("x")
    (job / ".tmp-of-mine").write_text("x")
    here.sweep()
    assert not half.exists()
    assert (job / ".tmp-of-mine").exists()
    assert [path for path in kept if not path.exists()] == []
    assert [path for path in (*gone, gone[-1].parent, gone[-2].parent) if path.exists()] == []
    assert (job / "a link").is_symlink()


def test_what_is_no_jobs_is_left_alone_where_the_result_goes_to_a_folder_with_more_in_it(tmp_path):
    here = workspace(tmp_path)
    here.create()
    others = [here.job_dir / name for name in ("docs/.letter.partial", "docs/.tmpAbCdEf", "jobs/x/.manifest.json.12.partial")]
    others += [here.tmp_dir / "letter.txt", here.tmp_dir / "mine" / "0.json"]
    ours = [here.tmp_dir / name for name in ("calibration/0.json", ".calibration.partial/0.json", "tokenized_dataset/a/b")]
    for path in [*others, *ours]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    here.sweep()
    clear_results(here, ["calibration", "converted"])
    assert [path for path in others if not path.exists()] == []
    assert sorted(here.tmp_dir.iterdir()) == [here.tmp_dir / "letter.txt", here.tmp_dir / "mine"]


def test_a_folder_of_intermediate_results_alone_goes_with_them(tmp_path):
    here = workspace(tmp_path)
    here.create()
    here.stage_dir("calibration").mkdir()
    clear_results(here, ["calibration"])
    assert here.job_dir.is_dir()
    assert not here.tmp_dir.exists()


def test_a_lock_that_a_dead_process_still_seems_to_hold_is_waited_for(tmp_path, monkeypatch):
    here = workspace(tmp_path)
    here.create()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    held = here.lock_path.open("w+")
    fcntl.flock(held, fcntl.LOCK_EX)
    held.write(json.dumps({"host": socket.gethostname(), "pid": dead.pid, "since": "now"}))
    held.flush()
    looks = []
    monkeypatch.setattr(time, "sleep", lambda seconds: looks.append(seconds) or (len(looks) == 3 and held.close()))
    with JobLock(here):
        assert len(looks) == 3


def test_a_lock_of_a_living_process_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with JobLock(workspace(tmp_path)), pytest.raises(JobLockedError, match="already running"), JobLock(workspace(tmp_path)):
        pass
