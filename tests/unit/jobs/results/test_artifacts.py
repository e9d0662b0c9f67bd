import pytest

from algorithms.modeling.files import folder_digest
from jobs.results.artifacts import canonical_digest, check_files, describe_folder, remove_folder, replace_folder, table_digest


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_table_of_files_gives_the_digest_of_the_folder(tmp_path):
    folder = write(tmp_path / "a", b="1", a__c="22", a__b="", zz="3")
    write(folder, **{".hidden": "no part of it", ".checkpoint-3__shard": "nor this", "a__.b__c": "nor this"})
    table = describe_folder(folder)
    assert list(table) == ["a/b", "a/c", "b", "zz"]
    assert table["a/c"].size == 2
    assert table_digest(table) == folder_digest(folder)


def test_every_difference_is_named(tmp_path):
    folder = write(tmp_path / "a", one="1", two="2", three="3")
    table = describe_folder(folder)
    assert check_files(folder, table, full=True).intact
    (folder / "one").unlink()
    (folder / "two").write_text("longer")
    (folder / "three").write_text("4")
    (folder / "further").write_text("does not matter")
    assert set(check_files(folder, table).problems) == {"one is missing", "two has 6 bytes, 1 were written"}
    assert "three has other content than was written" in check_files(folder, table, full=True).problems
    assert check_files(folder, table).damaged


def test_a_folder_without_any_of_the_files_is_absent_rather_than_damaged(tmp_path):
    table = describe_folder(write(tmp_path / "a", one="1"))
    for folder in (tmp_path / "none", write(tmp_path / "b", other="1")):
        state = check_files(folder, table)
        assert not state.present
        assert not state.damaged
        assert not state.intact


def test_digests_do_not_depend_on_the_order_of_keys():
    assert canonical_digest({"a": 1, "b": [1, 2]}) == canonical_digest({"b": [1, 2], "a": 1})
    assert canonical_digest({"a": 1}) != canonical_digest({"a": "1"})
    with pytest.raises(TypeError):
        canonical_digest({"a": object()})


def test_a_folder_takes_the_place_of_another(tmp_path):
    old, new = write(tmp_path / "place", old="1"), write(tmp_path / ".partial", new="2")
    write(tmp_path / ".place.replaced", left="by a kill")
    replace_folder(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "new").read_text() == "2"
    assert not (tmp_path / "place" / "old").exists()


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    folder = write(tmp_path / "a", one="1")
    (tmp_path / "link").symlink_to(folder)
    remove_folder(tmp_path / "link")
    assert (folder / "one").exists()
    remove_folder(folder)
    remove_folder(folder)
    assert not folder.exists()
