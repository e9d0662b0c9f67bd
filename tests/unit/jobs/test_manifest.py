import json

import pytest

from configs.errors import DataError
from jobs.manifest import Manifest, ManifestFile, Publication, RunRecord, StageRecord, Status, read_manifest
from jobs.results.artifacts import FileRecord

RECORD = StageRecord(
    key="k", algorithm="X", version=1, settings={"a": 1.5}, input_key="m", tokens_key=None, request=None, data="none", kind="x",
    directory="x", status=Status.FINISHED, started="s", files={"d/f": FileRecord(size=3, digest="q")}, warnings=("careful",),
)  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "manifest.json"
    manifest = ManifestFile(path)
    assert manifest.current == Manifest()
    run = RunRecord(id="i", status=Status.RUNNING, started="s", redone=("x",))
    manifest.update(run=run, published=Publication(key="k", files={"f": FileRecord(size=1, digest="z")}), warnings=("w",))
    manifest.record("x", RECORD)
    assert read_manifest(path) == manifest.current
    assert read_manifest(path).stages["x"] == RECORD
    assert json.loads(path.read_text())["stages"]["x"]["status"] == "finished"


def test_records_of_other_stages_stay(tmp_path):
    manifest = ManifestFile(tmp_path / "manifest.json")
    manifest.record("x", RECORD)
    manifest.record("y", RECORD)
    assert set(read_manifest(manifest.path).stages) == {"x", "y"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "stages": {"x": {"status": "finished"}}}'])
def test_an_unreadable_manifest_says_what_to_do(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="Choose another JOB_ID"):
        read_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b"])
def test_file_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    manifest = ManifestFile(tmp_path / "manifest.json")
    manifest.update(published=Publication(key="k", files={name: FileRecord(size=1, digest="z")}))
    with pytest.raises(DataError, match="no path inside the job folder"):
        read_manifest(manifest.path)


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-9], lambda text: text.replace('"user_cpu_s": 0.0', '"user_cpu_s": 0.5')]
)
def test_a_damaged_manifest_is_read_from_its_copy(tmp_path, caplog, damage):
    manifest = ManifestFile(tmp_path / "manifest.json")
    manifest.record("x", RECORD)
    text = manifest.path.read_text()
    assert damage(text) != text
    manifest.path.write_text(damage(text))
    assert read_manifest(manifest.path) == manifest.current
    assert f"{manifest.path} is damaged" in caplog.text
    again = ManifestFile(manifest.path)
    again.record("y", RECORD)
    caplog.clear()
    assert set(read_manifest(manifest.path).stages) == {"x", "y"}
    assert caplog.text == ""


def test_a_manifest_from_before_digests_is_read(tmp_path):
    manifest = ManifestFile(tmp_path / "manifest.json")
    manifest.record("x", RECORD)
    raw = json.loads(manifest.path.read_text())
    del raw["digest"]
    manifest.path.write_text(json.dumps(raw))
    assert read_manifest(manifest.path) == manifest.current


def test_a_figure_that_was_changed_in_both_is_noticed(tmp_path):
    manifest = ManifestFile(tmp_path / "manifest.json")
    manifest.record("x", RECORD)
    for path in (manifest.path, tmp_path / ".manifest.json.copy"):
        path.write_text(path.read_text().replace('"user_cpu_s": 0.0', '"user_cpu_s": 0.5'))
    with pytest.raises(DataError, match="not what was written"):
        read_manifest(manifest.path)
