import json

import datasets
import pytest

from configs.errors import DataError
from jobs.texts.location import locate, locate_corpus, locate_path, location_digest
from jobs.workspace import open_workspace
from tests.support.envelopes import envelope


def found(tmp_path, **keys):
    made = envelope(tmp_path / "user", **keys)
    return locate(made, open_workspace(made))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("a.jsonl", "json"),
        ("a.json", "json"),
        ("a.json.gz", "json"),
        ("a.csv", "csv"),
        ("a.parquet", "parquet"),
    ],
)
def test_the_suffix_says_how_a_file_is_read(tmp_path, name, kind):
    (tmp_path / name).write_text("x")
    location = found(tmp_path, DATA_PATH=str(tmp_path / name))
    assert location.kind == kind
    assert location.files == {"": (tmp_path / name,)}


@pytest.mark.parametrize("key", ["DATA_PATH", "DATASET_NAME"])
def test_token_lists_by_either_key(tmp_path, key):
    path = tmp_path / "calib.pt"
    path.write_bytes(b"x")
    assert found(tmp_path, **{key: str(path)}).kind == "tokens"


def test_a_token_list_by_its_name_in_the_user_folder(tmp_path):
    path = tmp_path / "user" / "datasets" / "calib.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert found(tmp_path, DATASET_NAME="calib.pth").files == {"": (path,)}


def test_data_path_comes_before_the_name(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert found(tmp_path, DATA_PATH=str(tmp_path / "a.txt"), DATASET_NAME="org/set").kind == "text"


def test_a_saved_data_set_by_its_name(tmp_path):
    folder = tmp_path / "user" / "datasets" / "org" / "mine"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
    location = found(tmp_path, DATASET_NAME="org/mine")
    assert (location.kind, location.folder) == ("saved", folder)


def test_names_that_are_nowhere_here_are_hub_ids(tmp_path):
    location = found(tmp_path, DATASET_NAME="org/set", DATASET_SUBNAME="main")
    assert (location.kind, location.name, location.subname, location.card) == ("hub", "org/set", "main", None)


@pytest.mark.parametrize(
    ("name", "subname", "corpus"),
    [
        ("wikitext2", None, "wikitext2"),
        ("wikitext", "wikitext-2-raw-v1", "wikitext2"),
        ("togethercomputer/RedPajama-Data-1T-Sample", None, "pajama"),
        ("PTB", None, "ptb"),
    ],
)
def test_corpora_by_name_and_alias(tmp_path, name, subname, corpus):
    location = found(tmp_path, DATASET_NAME=name, DATASET_SUBNAME=subname)
    assert location.kind == "hub"
    assert location.card.name == corpus


def test_a_local_file_takes_the_place_of_a_corpus(tmp_path):
    (tmp_path / "t.jsonl").write_text("{}")
    location = found(
        tmp_path, DATASET_NAME="togethercomputer/RedPajama-Data-1T-Sample", CORPORA={"pajama": str(tmp_path / "t.jsonl")}
    )
    assert (location.kind, location.card.name, location.from_corpora) == ("json", "pajama", True)


def test_corpora_by_split(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    made = envelope(tmp_path, CORPORA={"own": {"train": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")}})
    assert locate_corpus(made, "own").files == {"train": (tmp_path / "a.txt",), "test": (tmp_path / "b.txt",)}
    with pytest.raises(DataError, match=r"other is no known corpus.*CORPORA: \{other: FILE\}"):
        locate_corpus(made, "other")


def test_files_of_a_folder_go_to_the_split_that_their_name_says(tmp_path):
    folder = tmp_path / "test_folder"
    folder.mkdir()
    (folder / "dev").mkdir()
    for name in ("train.jsonl", "test-00000-of-00001.jsonl", "dev/my.jsonl", "gsm8k_valid.jsonl", "LICENSE", "README.txt"):
        (folder / name).write_text("{}")
    files = locate_path(folder, "DATA_PATH").files
    assert {split: sorted(path.name for path in paths) for split, paths in files.items()} == {
        "train": ["gsm8k_valid.jsonl", "train.jsonl"],
        "test": ["test-00000-of-00001.jsonl"],
        "validation": ["my.jsonl"],
    }


def test_texts_whose_names_merely_mention_a_split_are_all_read(tmp_path):
    for name in ("gsm8k_train.jsonl", "wikitext2_valid.jsonl"):
        (tmp_path / name).write_text("{}")
    files = locate_path(tmp_path, "DATA_PATH").files
    assert {split: len(paths) for split, paths in files.items()} == {"": 2}


def test_files_that_say_no_split_belong_to_all(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert locate_path(tmp_path, "DATA_PATH").files == {"": (tmp_path / "a.txt", tmp_path / "b.txt")}


def test_errors_say_where_and_what_is_near(tmp_path):
    (tmp_path / "stories.jsonl").write_text("{}")
    (tmp_path / "data.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"storys.jsonl: there is no such file or folder. .* holds stories.jsonl. Change DATA_PATH"
    ):
        found(tmp_path, DATA_PATH=str(tmp_path / "storys.jsonl"))
    with pytest.raises(DataError, match=r"files ending in .docx cannot be read; readable are .jsonl, .json, .csv"):
        found(tmp_path, DATA_PATH=str(tmp_path / "data.docx"))
    with pytest.raises(DataError, match="empty: the folder holds no text"):
        found(tmp_path, DATA_PATH=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="set DATA_PATH to a local file or folder, or DATASET_NAME"):
        found(tmp_path)
    (tmp_path / "empty" / "a.txt").write_text("x")
    (tmp_path / "empty" / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"several kinds \(csv, text\)"):
        found(tmp_path, DATA_PATH=str(tmp_path / "empty"))


def test_the_digest_follows_the_content_and_not_the_name_or_the_date(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps({"text": "x"}))
    second.write_text(json.dumps({"text": "x"}))
    before = location_digest(locate_path(first, "DATA_PATH"))
    assert before == location_digest(locate_path(second, "DATA_PATH"))
    first.write_text(json.dumps({"text": "y"}))
    assert before != location_digest(locate_path(first, "DATA_PATH"))


def test_the_digest_of_a_saved_data_set_follows_its_rows(tmp_path):
    def digest(name, rows):
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / name)
        return location_digest(locate_path(tmp_path / name, "DATA_PATH"))

    assert digest("a", ["x", "y"]) == digest("b", ["x", "y"])
    assert digest("c", ["x", "z"]) != digest("d", ["x", "y"])
