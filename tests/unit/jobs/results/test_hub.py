"""Uploads, to a stand-in for the hub that keeps what it is sent: what goes, what stays, and what failing comes to."""

import json
import logging

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

import main as program
from configs.errors import CertificateError, DataError, ExitCode, UploadError
from jobs.command_line import commands
from jobs.runner import push_result, run_job
from tests.support.fake_job import job_dir, manifest, parts, recipe
from tests.support.recipes import SMALL, load, problems_of

ASKED = {"PUSH_TO_HUB": "org/small"}
SENT = ["README.md", "certificate.json", "config.json", "model.safetensors"]
SECRET = "hf_0123456789abcdef"


class Hub:
    """Repositories by name: their visibility, and their files with what they hold."""

    def __init__(self, trouble: Exception | None = None) -> None:
        self.trouble, self.opened, self.commits = trouble, 0, 0
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}

    def __call__(self) -> "Hub":
        self.opened += 1
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.trouble is not None:
            raise self.trouble
        assert exist_ok
        self.private.setdefault(repo_id, private)

    def create_commit(self, repo_id, operations, *, commit_message):
        assert repo_id in self.private
        self.commits += 1
        for operation in operations:
            with operation.as_file() as stream:
                self.files[operation.path_in_repo] = stream.read()


def run(folder, hub: Hub, *, behaviour: str = "pass", envelope: dict | None = None, **options):
    loaded = recipe(folder, envelope=ASKED if envelope is None else envelope, **options)
    return run_job(loaded, parts=parts(folder, behaviour, open_hub=hub))


def test_a_result_that_passed_is_sent_file_for_file_to_a_private_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub = Hub()
    run(tmp_path, hub, data=SECRET)
    assert hub.private == {"org/small": True}
    assert sorted(hub.files) == SENT
    for name, content in hub.files.items():
        assert content == (job_dir(tmp_path) / name).read_bytes()
    assert SECRET not in (job_dir(tmp_path) / "recipe.yaml").read_text()
    assert "(secret)" in (job_dir(tmp_path) / "recipe.yaml").read_text()
    assert not any(SECRET.encode() in content for content in hub.files.values())
    assert "DATASET_NAME: (secret)" in hub.files["README.md"].decode()
    assert manifest(tmp_path)["uploaded"]["repository"] == "org/small"


def test_a_result_that_is_there_is_not_sent_again_and_another_one_is(tmp_path):
    hub = Hub()
    run(tmp_path, hub)
    run(tmp_path, hub)
    assert hub.commits == 1
    run(tmp_path, hub, scale=0.25)
    assert hub.commits == 2
    run(tmp_path, hub, scale=0.25, envelope={"PUSH_TO_HUB": "org/other"})
    assert (hub.commits, set(hub.private)) == (3, {"org/small", "org/other"})


def test_nobody_who_did_not_ask_is_uploaded(tmp_path):
    hub = Hub()
    run(tmp_path, hub, envelope={})
    assert hub.opened == 0
    with pytest.raises(DataError, match="names no repository"):
        push_result(recipe(tmp_path), parts=parts(tmp_path, open_hub=hub))
    assert hub.opened == 0


def test_what_failed_its_certificate_is_never_sent(tmp_path):
    hub = Hub()
    with pytest.raises(CertificateError):
        run(tmp_path, hub, behaviour="wrong")
    with pytest.raises(DataError, match="failed the certificate"):
        push_result(recipe(tmp_path, envelope=ASKED), parts=parts(tmp_path, open_hub=hub))
    assert hub.opened == 0


def test_what_nobody_could_check_waits_for_the_command(tmp_path, caplog):
    hub = Hub()
    run(tmp_path, hub, behaviour="absent")
    assert hub.opened == 0
    assert "nobody here could check dense" in caplog.text
    assert "python main.py push --yaml_path recipe.yaml" in caplog.text
    push_result(recipe(tmp_path, envelope=ASKED), parts=parts(tmp_path, open_hub=hub))
    assert sorted(hub.files) == SENT


def test_a_part_of_a_job_leaves_nothing_to_send(tmp_path, caplog):
    hub = Hub()
    run(tmp_path, hub, envelope={**ASKED, "STAGES": ["calibration"]})
    assert "leave no result" in caplog.text
    with pytest.raises(DataError, match="no finished result yet"):
        push_result(recipe(tmp_path, envelope=ASKED), parts=parts(tmp_path, open_hub=hub))
    assert hub.opened == 0


@pytest.mark.parametrize("trouble", [OfflineModeIsEnabled("offline"), OSError("no route"), ValueError("no such owner")])
def test_an_upload_that_fails_leaves_a_finished_job_and_the_command_that_repeats_it(tmp_path, trouble):
    with pytest.raises(UploadError, match=r"python main.py push --yaml_path recipe.yaml") as caught:
        run(tmp_path, Hub(trouble))
    assert str(trouble) in str(caught.value)
    assert manifest(tmp_path)["run"]["status"] == "finished"
    assert manifest(tmp_path)["uploaded"] is None
    hub = Hub()
    push_result(recipe(tmp_path, envelope=ASKED), parts=parts(tmp_path, open_hub=hub))
    assert sorted(hub.files) == SENT


def test_an_upload_that_fails_has_an_exit_code_of_its_own(tmp_path, monkeypatch, capsys):
    def fail(loaded, arguments):
        raise UploadError("PUSH_TO_HUB org/small: the upload failed.")

    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL)
    monkeypatch.setitem(commands._ACTIONS, "run", fail)
    assert program.main(["--yaml_path", str(file)]) == ExitCode.UPLOAD == 6
    assert "the upload failed" in capsys.readouterr().err


def test_a_dry_run_lists_what_would_be_sent_and_opens_nothing(tmp_path):
    run(tmp_path, Hub(), envelope={})
    hub = Hub()
    lines = push_result(recipe(tmp_path, envelope=ASKED), is_dry_run=True, parts=parts(tmp_path, open_hub=hub))
    assert hub.opened == 0
    assert lines[0] == f"{job_dir(tmp_path)} -> https://huggingface.co/org/small"
    assert [line.split()[0] for line in lines[1:-1]] == ["README.md", "config.json", "model.safetensors", "certificate.json"]
    count = (job_dir(tmp_path) / "model.safetensors").stat().st_size
    assert f"{count / 1000:.1f} kB" in next(line for line in lines if "model.safetensors" in line)
    assert lines[-1].strip().startswith("4 files, ")
    assert manifest(tmp_path)["uploaded"] is None


def test_a_file_that_has_changed_since_is_not_sent(tmp_path):
    run(tmp_path, Hub(), envelope={})
    (job_dir(tmp_path) / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match=r"model\.safetensors has 5 bytes, .* were written since the job"):
        push_result(recipe(tmp_path, envelope=ASKED), parts=parts(tmp_path, open_hub=Hub()))


def test_hidden_files_and_those_of_the_job_stay_even_where_a_manifest_names_them(tmp_path):
    run(tmp_path, Hub(), envelope={})
    file = job_dir(tmp_path) / "manifest.json"
    found = json.loads(file.read_text())
    for name in (".job.lock", "tmp/calibration/0.json", "exports/.hidden/x.json"):
        found["published"]["files"][name] = {"size": 1, "digest": "d"}
    file.write_text(json.dumps(found))
    hub = Hub()
    push_result(recipe(tmp_path, envelope=ASKED), parts=parts(tmp_path, open_hub=hub))
    assert sorted(hub.files) == SENT


def test_both_spellings_name_a_repository_with_its_owner(tmp_path):
    assert load(SMALL, tmp_path).recipe.push_to_hub is None
    assert load(SMALL + "push_to_hub: org/name\n", tmp_path).recipe.push_to_hub == "org/name"
    assert load(SMALL, tmp_path, "PUSH_TO_HUB=me/my.model-2b").recipe.push_to_hub == "me/my.model-2b"
    (problem,) = problems_of(SMALL + "push_to_hub: name\n", tmp_path)
    assert (problem.key, problem.line, problem.value) == ("PUSH_TO_HUB", 11, "name")
    (problem,) = problems_of(SMALL + "push_to_hub: a/b\nPUSH_TO_HUB: a/b\n", tmp_path)
    assert "the same key" in problem.expected
    for name in ("org/", "/name", "a/b/c", "../x", "a/..", "a b/c", f"o/{'n' * 100}"):
        assert problems_of(SMALL, tmp_path, f"PUSH_TO_HUB={name}"), name


def test_the_log_says_where_the_result_has_gone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path, Hub())
    assert "Uploaded 4 files, " in caplog.text
    assert "to https://huggingface.co/org/small" in caplog.text
