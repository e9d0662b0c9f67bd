import gzip
import json

import datasets
import pytest

from configs.errors import DataError
from jobs.texts import documents
from jobs.texts.documents import open_documents
from jobs.texts.location import locate_corpus, locate_path
from tests.support.envelopes import envelope

ROWS = [{"question": f"q{index}", "answer": f"a{index}", "number": index} for index in range(10)]
QA = {"TEXT_COLUMN": "question,answer", "FORMAT_STRING": "Question: {question}\nAnswer: {answer}"}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path):
    table = datasets.Dataset.from_list(ROWS)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.name == "saved":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": table, "test": table.select([3, 4])}).save_to_disk(path)
    return path


def texts(path, tmp_path, split="train", by_line=False, **keys):
    made = envelope(tmp_path, **keys)
    opened = open_documents(locate_path(path, "DATA_PATH"), made, tmp_path / "cache", split=split, by_line=by_line)
    return opened.fetch(range(len(opened)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.parquet", "saved", "saved_splits"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = write(tmp_path / name)
    assert texts(path, tmp_path, **QA) == [f"Question: q{index}\nAnswer: a{index}" for index in range(10)]
    assert texts(path, tmp_path, TEXT_COLUMN="answer", split="train[2:4]") == ["a2", "a3"]


def test_documents_are_fetched_in_the_order_that_is_asked_for(tmp_path):
    location = locate_path(write(tmp_path / "a.jsonl"), "DATA_PATH")
    opened = open_documents(location, envelope(tmp_path, TEXT_COLUMN="answer"), tmp_path / "cache", split="train")
    assert opened.fetch([7, 0, 7]) == ["a7", "a0", "a7"]


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[-2:]", [8, 9]),
        ("train[20%:50%]", [2, 3, 4]),
        ("test", [3, 4]),
        ("test+train[:1]", [3, 4, 0]),
    ],
)
def test_slices_of_splits(tmp_path, split, rows):
    assert texts(write(tmp_path / "saved_splits"), tmp_path, split=split, TEXT_COLUMN="answer") == [f"a{row}" for row in rows]


def test_unknown_splits_and_columns_list_what_there_is(tmp_path):
    path = write(tmp_path / "saved_splits")
    with pytest.raises(DataError, match=r"no split 'validation'; there are test, train. Change SPLIT"):
        texts(path, tmp_path, split="validation", TEXT_COLUMN="answer")
    with pytest.raises(DataError, match=r"no column 'text'; the columns are question, answer, number. Change TEXT_COLUMN"):
        texts(path, tmp_path)
    with pytest.raises(DataError, match=r'SPLIT=.*is no split: write "train"'):
        texts(path, tmp_path, split="train[0]", TEXT_COLUMN="answer")
    with pytest.raises(DataError, match=r"the column 'number' holds int, not text.*FORMAT_STRING"):
        texts(path, tmp_path, TEXT_COLUMN="number")


def test_absent_values_are_empty_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "other": null}\n{"text": null, "other": "y"}\n')
    assert texts(path, tmp_path) == ["x", ""]
    assert texts(path, tmp_path, TEXT_COLUMN="text,other", FORMAT_STRING="{text}-{other}") == ["x-", "-y"]


def test_a_text_file_is_one_document_or_one_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n two \n\nthree é")
    assert texts(tmp_path / "a.txt", tmp_path) == ["one\n two \n\nthree é"]
    assert texts(tmp_path / "a.txt", tmp_path, by_line=True) == ["one", "two", "", "three é"]
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a.txt is not UTF-8 text \(byte 3\)"):
        texts(tmp_path / "a.txt", tmp_path)


def test_a_broken_file_says_which(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ')
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read as json \(.+\)"):
        texts(tmp_path / "a.jsonl", tmp_path)


def test_lines_of_a_corpus_are_its_rows(tmp_path, cache):
    (tmp_path / "w.txt").write_text(" \n = Title = \n\n Text . \n")
    made = envelope(tmp_path, CORPORA={"wikitext2": str(tmp_path / "w.txt"), "ptb": str(tmp_path / "w.txt")})
    wiki = open_documents(locate_corpus(made, "wikitext2"), made, cache, split="test")
    assert wiki.fetch(range(len(wiki))) == ["", " = Title = \n", "", " Text . \n"]
    ptb = open_documents(locate_corpus(made, "ptb"), made, cache, split="test")
    assert ptb.fetch(range(len(ptb))) == ["", "= Title =", "", "Text ."]


def test_the_column_of_a_corpus_is_its_own(tmp_path, cache):
    (tmp_path / "p.jsonl").write_text('{"sentence": "s", "text": "t"}\n')
    made = envelope(
        tmp_path, TEXT_COLUMN="question", CORPORA={"ptb": str(tmp_path / "p.jsonl"), "own": str(tmp_path / "p.jsonl")}
    )
    assert open_documents(locate_corpus(made, "ptb"), made, cache, split="test").fetch([0]) == ["s"]
    assert open_documents(locate_corpus(made, "own"), made, cache, split="test").fetch([0]) == ["t"]


def hub(monkeypatch, answer):
    calls = []

    def load_dataset(name, subname=None, **options):
        calls.append((name, subname, options))
        outcome = answer(options)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(documents.datasets, "load_dataset", load_dataset)
    return calls


def test_the_hub_is_asked_for_the_split_and_uses_the_cache_folder(tmp_path, cache, monkeypatch):
    calls = hub(monkeypatch, lambda options: datasets.Dataset.from_dict({"text": ["a", "b"]}))
    made = envelope(tmp_path)
    opened = open_documents(locate_corpus(made, "wikitext2"), made, cache, split="train[:2]")
    assert opened.fetch([1, 0]) == ["b", "a"]
    options = {"split": "train[:2]", "cache_dir": str(cache), "revision": None}
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", options)]


def test_c4_names_its_revision_and_one_file(tmp_path, cache, monkeypatch):
    calls = hub(monkeypatch, lambda options: datasets.Dataset.from_dict({"text": ["a"]}))
    made = envelope(tmp_path)
    open_documents(locate_corpus(made, "c4"), made, cache, split="validation")
    (_, _, options), *_ = calls
    assert options["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert options["revision"] == "607bd4c8450a42878aa9ddc051a65a055450ef87"


def test_data_sets_made_by_a_script_are_looked_for_as_parquet(tmp_path, cache, monkeypatch):
    def answer(options):
        if options["revision"] is None:
            return RuntimeError("Dataset scripts are no longer supported, but found ptb.py")
        return datasets.Dataset.from_dict({"sentence": ["a"]})

    calls = hub(monkeypatch, answer)
    made = envelope(tmp_path)
    assert open_documents(locate_corpus(made, "ptb"), made, cache, split="train").fetch([0]) == ["a"]
    assert calls[1][2]["revision"] == "refs/convert/parquet"


def test_scripts_without_a_parquet_copy_say_what_to_do(tmp_path, cache, monkeypatch):
    def answer(options):
        if options["revision"] is None:
            return RuntimeError("Dataset scripts are no longer supported, but found pajama.py")
        return FileNotFoundError("no such branch")

    hub(monkeypatch, answer)
    made = envelope(tmp_path)
    with pytest.raises(DataError, match=r"found pajama.py\). Data sets made by a script cannot.*CORPORA: \{pajama: FILE\}"):
        open_documents(locate_corpus(made, "pajama"), made, cache, split="train")


def test_being_offline_is_said(tmp_path, cache, monkeypatch):
    hub(monkeypatch, lambda options: ConnectionError("Couldn't reach it"))
    made = envelope(tmp_path)
    with pytest.raises(DataError, match=r"The hub cannot be reached from here.*local file under CORPORA: \{c4: FILE\}"):
        open_documents(locate_corpus(made, "c4"), made, cache, split="train")
