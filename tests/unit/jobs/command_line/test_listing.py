"""Jobs as their manifests tell."""

import json
import os
import socket
from pathlib import Path

from jobs.command_line.listing import list_jobs


def write_job(user_folder: Path, name: str, status: str, stages: dict[str, str]) -> Path:
    """A job folder with a manifest that says this."""
    folder = user_folder / "jobs" / name
    folder.mkdir(parents=True)
    records = {stage: {"status": state} for stage, state in stages.items()}
    (folder / "manifest.json").write_text(json.dumps({"algorithm": "AQLM", "run": {"status": status}, "stages": records}))
    return folder


def test_jobs_are_listed_by_name_with_the_status_of_each_stage(tmp_path):
    write_job(tmp_path, "Kompress/b", "failed", {"calibration": "finished", "conversion": "failed"})
    write_job(tmp_path, "Kompress/a/deeper", "finished", {})
    inside = tmp_path / "jobs/Kompress/b/tmp/other"
    inside.mkdir(parents=True)
    (inside / "manifest.json").write_text("{}")
    entries = list_jobs(tmp_path)
    assert [(job.name, job.status) for job in entries] == [("Kompress/a/deeper", "finished"), ("Kompress/b", "failed")]
    assert entries[1].stages == {"calibration": "finished", "conversion": "failed"}


def test_running_with_nobody_there_means_killed(tmp_path):
    folder = write_job(tmp_path, "Kompress/x", "running", {"calibration": "running"})
    assert [(job.status, job.stages["calibration"]) for job in list_jobs(tmp_path)] == [("killed", "killed")]
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "now"}
    (folder / ".job.lock").write_text(json.dumps(holder))
    assert [job.status for job in list_jobs(tmp_path)] == ["running"]
    (folder / ".job.lock").write_text(json.dumps({**holder, "host": "another-machine"}))
    assert [job.status for job in list_jobs(tmp_path)] == ["running"]


def test_unreadable_manifests_are_listed_as_such(tmp_path):
    for name, content in (("a", "{"), ("b", "[]"), ("c", "{}"), ("d", '{"stages": {"x": 3}, "run": null, "algorithm": 1}')):
        folder = tmp_path / "jobs/Kompress" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(content)
    assert {job.status for job in list_jobs(tmp_path)} == {"manifest unreadable"}


def test_no_folder_means_no_jobs(tmp_path):
    assert list_jobs(tmp_path / "none") == ()
