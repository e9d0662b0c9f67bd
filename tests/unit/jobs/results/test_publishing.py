import os

import pytest

from algorithms.modeling.files import visible_files
from configs.errors import DataError
from jobs.manifest import ManifestFile, Publication
from jobs.results import publishing
from jobs.results.artifacts import describe_folder
from jobs.results.publishing import check_target, count_files, format_folder, is_published, publish, write_extra

NAMES = (
    "config.json", "zz.safetensors", "exports/b/config.json", "exports/b/b.safetensors", "exports/c/model.gguf",
    "packed/p.safetensors",
)  # fmt: skip


@pytest.fixture
def job(tmp_path):
    return tmp_path / "job"


def stage(folder, names=NAMES, text="1"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Publication(key=f"key of {text}", files=describe_folder(folder))


def manifest_in(job):
    job.mkdir(exist_ok=True)
    return ManifestFile(job / "manifest.json")


def test_the_log_counts_one_file_as_one(tmp_path, job, caplog):
    assert [count_files(number) for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    manifest = manifest_in(job)
    publish(tmp_path / "old", job, manifest, stage(tmp_path / "old", ("a.safetensors",)))
    with caplog.at_level("INFO"):
        publish(tmp_path / "new", job, manifest, stage(tmp_path / "new", ("b.safetensors",)))
    assert "Removed 1 file of an earlier result" in caplog.text


def test_files_are_linked_and_every_config_comes_last(tmp_path, job, monkeypatch):
    placed, place = [], publishing.place_file
    monkeypatch.setattr(publishing, "place_file", lambda a, b: (placed.append(b.relative_to(job).as_posix()), place(a, b)))
    publication = stage(tmp_path / "converted")
    publish(tmp_path / "converted", job, manifest_in(job), publication)
    assert placed[-2:] == ["exports/b/config.json", "config.json"]
    assert set(placed) == set(NAMES)
    assert (job / "zz.safetensors").samefile(tmp_path / "converted" / "zz.safetensors")
    assert is_published(tmp_path / "converted", job, publication, publication)


def test_files_become_readable_for_whoever_may_enter_the_folder(tmp_path, job):
    publication = stage(tmp_path / "converted")
    (tmp_path / "converted" / "zz.safetensors").chmod(0o600)
    job.mkdir(mode=0o755)
    publish(tmp_path / "converted", job, manifest_in(job), publication)
    assert (job / "zz.safetensors").stat().st_mode & 0o777 == 0o644


def test_files_are_copied_where_links_fail(tmp_path, job, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    publish(tmp_path / "converted", job, manifest_in(job), stage(tmp_path / "converted"))
    assert (job / "zz.safetensors").read_text() == "1"
    assert not (job / "zz.safetensors").samefile(tmp_path / "converted" / "zz.safetensors")


def test_only_files_that_the_manifest_lists_are_removed(tmp_path, job):
    manifest = manifest_in(job)
    publish(tmp_path / "one", job, manifest, stage(tmp_path / "one"))
    (job / "mine.txt").write_text("the user's")
    (job / "exports" / "b" / "notes").write_text("the user's")
    publish(tmp_path / "two", job, manifest, stage(tmp_path / "two", ("config.json", "new.safetensors"), "2"))
    left = {path.relative_to(job).as_posix() for path in visible_files(job)}
    assert left == {"config.json", "new.safetensors", "mine.txt", "exports/b/notes", "manifest.json"}
    assert not (job / "packed").exists()
    assert (tmp_path / "one" / "zz.safetensors").read_text() == "1", "the stage's own file stays"


def test_a_kill_in_the_middle_leaves_no_config_and_is_repaired(tmp_path, job, monkeypatch):
    manifest, place = manifest_in(job), publishing.place_file
    publish(tmp_path / "one", job, manifest, stage(tmp_path / "one"))
    second = stage(tmp_path / "two", (*NAMES[:2], "added.safetensors"), "22")

    def die(source, target):
        if target.name == "zz.safetensors":
            raise KeyboardInterrupt
        place(source, target)

    monkeypatch.setattr(publishing, "place_file", die)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "two", job, manifest, second)
    assert not list(job.rglob("config.json"))
    again = ManifestFile(manifest.path)
    assert not is_published(tmp_path / "two", job, again.current.published, second)
    check_target(job, again.current.published)
    monkeypatch.setattr(publishing, "place_file", place)
    third = stage(tmp_path / "three", NAMES[:2], "333")
    publish(tmp_path / "three", job, again, third)
    assert {path.name for path in visible_files(job)} == {"config.json", "zz.safetensors", "manifest.json"}


def test_a_withheld_format_keeps_its_files_and_loses_its_config(tmp_path, job):
    publication = stage(tmp_path / "converted")
    publish(tmp_path / "converted", job, manifest_in(job), publication, withheld=["exports/b"])
    assert (job / "config.json").is_file()
    assert (job / "exports/b/b.safetensors").is_file()
    assert not (job / "exports/b/config.json").exists()
    assert (job / "exports/c/model.gguf").is_file()
    assert is_published(tmp_path / "converted", job, publication, publication, ["exports/b"])
    assert not is_published(tmp_path / "converted", job, publication, publication)


def test_a_withheld_gguf_file_is_not_there_since_it_needs_no_config(tmp_path, job):
    publication = stage(tmp_path / "converted")
    publish(tmp_path / "converted", job, manifest_in(job), publication, withheld=["exports/c"])
    assert not (job / "exports/c/model.gguf").exists()
    assert (job / "exports/b/config.json").is_file()


def test_the_card_replaces_a_link_and_not_what_it_leads_to(tmp_path, job):
    manifest = manifest_in(job)
    publish(tmp_path / "converted", job, manifest, stage(tmp_path / "converted", (*NAMES, "README.md")))
    write_extra(job / "README.md", "card", manifest, job)
    assert (job / "README.md").read_text() == "card"
    assert (tmp_path / "converted" / "README.md").read_text() == "1"
    assert manifest.current.published.files["README.md"].size == 4


def test_a_folder_with_a_foreign_model_is_refused(tmp_path, job):
    check_target(job, None)
    publication = stage(job)
    check_target(job, publication)
    with pytest.raises(DataError, match=r"config\.json, zz\.safetensors"):
        check_target(job, None)


def test_the_first_format_stands_in_the_folder_itself():
    assert [format_folder(name, ("a", "b")) for name in ("a", "b")] == ["", "exports/b"]
