import json
import logging

import pytest
import torch

from algorithms.base import TokenRequest
from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from jobs import datasets
from jobs.datasets import UNSCORED, chunked_wikitext, corpus_tokens, load_tokens, tokens_key
from jobs.texts.windows import split_validation
from jobs.workspace import open_workspace
from tests.support.byte_model import BOS, VOCABULARY, byte_ids, save_tokenizer, text_of
from tests.support.envelopes import envelope

PROBLEMS = [{"question": f"How many are {index} and {index}?", "answer": f"{2 * index}"} for index in range(200)]
QA = {"TEXT_COLUMN": "question,answer", "FORMAT_STRING": "Q {question} A {answer}"}
SHORT = TokenRequest(num_samples=10, sequence_length=24, seed=0, validation_samples=3)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
    return ModelSource(folder, name="tiny")


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return path


@pytest.fixture
def calibration_list(tmp_path):
    path = tmp_path / "calib.pt"
    torch.save([torch.arange(5 + index)[None] for index in range(12)], path)
    return path


class Job:
    """One recipe with its workspace, asked for tokens."""

    def __init__(self, tmp_path, source, **keys):
        self.recipe = envelope(tmp_path / "user", **keys)
        self.workspace = open_workspace(self.recipe)
        self.source = source

    def key(self, request=SHORT):
        return tokens_key(self.recipe, request, self.source)

    def tokens(self, request=SHORT):
        return load_tokens(self.recipe, request, self.source, self.workspace)

    def corpus(self, name, **options):
        return corpus_tokens(name, self.recipe, self.source, self.workspace, **options)


def all_sequences(sets):
    """The sequences in the order of the record."""
    found = dict(zip(sets.record["validation"], sets.validation, strict=True))
    rest = iter(sets.train)
    return [found[index] if index in found else next(rest) for index in range(len(sets.train) + len(sets.validation))]


def test_windows_are_slices_of_the_formatted_documents(tmp_path, source, problems):
    sets = Job(tmp_path, source, DATA_PATH=str(problems), **QA).tokens()
    documents = [[BOS, *byte_ids(f"Q {row['question']} A {row['answer']}")] for row in PROBLEMS]
    assert (len(sets.train), len(sets.validation)) == (7, 3)
    for window, (document, start) in zip(all_sequences(sets), sets.record["samples"], strict=True):
        assert window.tolist() == [documents[document][start : start + 24]]
    assert sets.record["tokenizer"]["bos_added"] is True
    assert sets.record["counts"]["documents"] == 200


def test_documents_shorter_than_a_window_are_packed(tmp_path, source, problems):
    sets = Job(tmp_path, source, DATA_PATH=str(problems), **QA).tokens(TokenRequest(num_samples=5, sequence_length=100, seed=1))
    text = text_of(torch.cat(all_sequences(sets), dim=1))
    assert "$^Q How many are " in text
    assert sets.record["method"] == "documents end to end, cut into windows"


def test_unpacked_requests_keep_documents_apart(tmp_path, source, problems):
    request = TokenRequest(num_samples=4, sequence_length=100, seed=0, packed=False)
    sets = Job(tmp_path, source, DATA_PATH=str(problems), **QA).tokens(request)
    for window, (document, _) in zip(all_sequences(sets), sets.record["samples"], strict=True):
        row = PROBLEMS[document]
        assert text_of(window) == f"^Q {row['question']} A {row['answer']}"


@pytest.mark.parametrize("key", ["DATA_PATH", "DATASET_NAME"])
def test_a_token_list_is_taken_in_file_order_at_its_own_lengths(tmp_path, source, calibration_list, key):
    sets = Job(tmp_path, source, **{key: str(calibration_list)}).tokens()
    assert [window.tolist() for window in all_sequences(sets)] == [[list(range(5 + index))] for index in range(10)]
    train, validation = split_validation(10, 3, seed=0)
    assert [window.shape[1] - 5 for window in sets.train] == train
    assert [window.shape[1] - 5 for window in sets.validation] == validation == sets.record["validation"]
    assert (sets.record["counts"]["shortest"], sets.record["counts"]["longest"]) == (5, 14)


def test_a_token_list_needs_no_tokenizer(tmp_path, source, calibration_list):
    (source.directory / "tokenizer.json").unlink()
    (source.directory / "tokenizer_config.json").unlink()
    job = Job(tmp_path, source, DATA_PATH=str(calibration_list))
    assert len(job.tokens().train) == 7
    with pytest.raises(DataError, match="holds no tokenizer"):
        Job(tmp_path, source, DATA_PATH=str(tmp_path / "model" / "config.json")).key()


def test_ids_beyond_the_vocabulary_are_an_error_with_both_numbers(tmp_path, source):
    torch.save([torch.tensor([[1, 300]]), torch.tensor([[1, 2]])], tmp_path / "calib.pt")
    job = Job(tmp_path, source, DATA_PATH=str(tmp_path / "calib.pt"))
    with pytest.raises(DataError, match="largest token id is 300, but the vocabulary of tiny has 259 entries"):
        job.tokens(TokenRequest(num_samples=2, sequence_length=2, seed=0))


def test_the_second_call_reads_the_cache_and_tokenises_nothing(tmp_path, source, problems, monkeypatch):
    job = Job(tmp_path, source, DATA_PATH=str(problems), **QA)
    first = job.tokens()
    monkeypatch.setattr(datasets, "Encoder", None)
    second = job.tokens()
    assert second.key == first.key == job.key()
    assert second.record == first.record
    assert all(torch.equal(a, b) for a, b in zip(first.train + first.validation, second.train + second.validation, strict=True))


def test_a_damaged_cache_is_made_again(tmp_path, source, problems, caplog):
    job = Job(tmp_path, source, DATA_PATH=str(problems), **QA)
    first = job.tokens()
    file = job.workspace.tokens_dir / first.key / "tokens.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        second = job.tokens()
    assert "tokenising again" in caplog.text
    assert torch.equal(first.train[0], second.train[0])


def test_the_key_covers_what_shapes_the_tokens(tmp_path, source, problems):
    keys = {"base": Job(tmp_path, source, DATA_PATH=str(problems), **QA).key()}
    keys["columns"] = Job(tmp_path, source, DATA_PATH=str(problems), TEXT_COLUMN="question").key()
    keys["format"] = Job(tmp_path, source, DATA_PATH=str(problems), **(QA | {"FORMAT_STRING": "{question}{answer}"})).key()
    keys["split"] = Job(tmp_path, source, DATA_PATH=str(problems), SPLIT="train[:50]", **QA).key()
    changes = {"num_samples": 11, "sequence_length": 25, "seed": 1, "validation_samples": 2, "packed": False}
    for name, value in [*changes.items(), ("num_samples", None)]:
        shape = {"num_samples": 10, "sequence_length": 24, "seed": 0, "validation_samples": 3} | {name: value}
        keys[name, value] = Job(tmp_path, source, DATA_PATH=str(problems), **QA).key(TokenRequest(**shape))
    problems.write_text(problems.read_text() + '{"question": "?", "answer": "!"}\n')
    keys["content"] = Job(tmp_path, source, DATA_PATH=str(problems), **QA).key()
    config = source.directory / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    keys["tokenizer"] = Job(tmp_path, source, DATA_PATH=str(problems), **QA).key()
    assert len(set(keys.values())) == len(keys)


def test_the_key_ignores_what_does_not_shape_the_tokens(tmp_path, source, problems, calibration_list):
    base = Job(tmp_path, source, DATA_PATH=str(problems), **QA).key()
    copy = tmp_path / "copy.jsonl"
    copy.write_text(problems.read_text())
    assert Job(tmp_path, source, DATA_PATH=str(copy), JOB_ID="other", **QA).key() == base
    tokens = {Job(tmp_path, source, DATA_PATH=str(calibration_list), TEXT_COLUMN=column).key() for column in ("text", "other")}
    assert len(tokens) == 1


def test_wikitext_is_joined_and_cut_anywhere(tmp_path, source):
    lines = [f" Line {index} of the text . \n" for index in range(60)]
    (tmp_path / "wiki.txt").write_text("".join(lines))
    sets = Job(tmp_path, source, DATASET_NAME="wikitext2", CORPORA={"wikitext2": str(tmp_path / "wiki.txt")}).tokens()
    whole = [BOS, *byte_ids("\n\n".join(lines))]
    for window, (_, start) in zip(all_sequences(sets), sets.record["samples"], strict=True):
        assert window.tolist() == [whole[start : start + 24]]
    assert sets.record["text"]["files"] == [str(tmp_path / "wiki.txt")]


def test_c4_draws_from_long_documents_only_and_never_joins(tmp_path, source):
    rows = [{"text": "short"}] * 20 + [{"text": chr(97 + index) * (30 + index)} for index in range(12)]
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job(tmp_path, source, DATASET_NAME="c4", CORPORA={"c4": str(path)}, TEXT_COLUMN="anything")
    sets = job.tokens()
    assert len({document for document, _ in sets.record["samples"]}) == 10
    assert all(len(set(text_of(window)) - {"^"}) == 1 for window in all_sequences(sets))
    with pytest.raises(DataError, match=r"12 of 32 documents have 24 tokens or more .* nsamples=40"):
        job.tokens(TokenRequest(num_samples=40, sequence_length=24, seed=0))


def test_scored_texts_follow_the_rules_of_their_corpus(tmp_path, source):
    (tmp_path / "ptb.txt").write_text(" first line \n second \n")
    files = {"train": str(tmp_path / "absent.txt"), "validation": str(tmp_path / "ptb.txt")}
    (tmp_path / "absent.txt").write_text("not this")
    job = Job(tmp_path, source, CORPORA={"ptb": files, "ptb_new": str(tmp_path / "ptb.txt"), "own": str(tmp_path / "ptb.txt")})
    assert job.corpus("ptb").tolist() == [BOS, *byte_ids("first line\n\nsecond")]
    assert job.corpus("ptb", split="train").tolist() == [BOS, *byte_ids("not this")]
    assert job.corpus("ptb_new").tolist() == [BOS, *byte_ids("first line second")]
    assert job.corpus("own").tolist() == [BOS, *byte_ids(" first line \n second \n")]


def test_rows_of_a_local_text_use_the_recipes_template(tmp_path, source, problems):
    job = Job(tmp_path, source, CORPORA={"sums": str(problems)}, **QA)
    expected = "\n\n".join(f"Q {row['question']} A {row['answer']}" for row in PROBLEMS)
    assert job.corpus("sums").tolist() == [BOS, *byte_ids(expected)]


def test_c4_new_is_cut_after_256_windows(tmp_path, source):
    (tmp_path / "c4.txt").write_text("word " * 100 + "\n" + "other\n" * 2000)
    job = Job(
        tmp_path, source, CORPORA={"c4_new": str(tmp_path / "c4.txt")}, EVALUATION={"perplexity": [], "sequence_length": 4}
    )
    expected = [BOS, *byte_ids(" ".join([("word " * 100).strip(), *["other"] * 1099]))]
    assert job.corpus("c4_new").tolist() == expected[:1024]


@pytest.mark.parametrize(
    ("name", "splits", "found"),
    [
        ("wikitext2", ("train", "validation", "test"), "validation"),
        ("wikitext2", ("train", "test"), "train"),
        ("wikitext2", ("test",), "test"),
        ("ptb", ("train", "validation", "test"), "train"),
        ("own", ("validation", "test"), "validation"),
        ("own", ("train", "validation"), "train"),
    ],
)
def test_what_is_read_on_the_way_is_not_what_is_scored(tmp_path, source, name, splits, found):
    for split in splits:
        (tmp_path / f"{split}.txt").write_text(split)
    job = Job(tmp_path, source, CORPORA={name: {split: str(tmp_path / f"{split}.txt") for split in splits}})
    assert text_of(job.corpus(name, split=UNSCORED)[None]) == f"^{found}"


def test_without_a_number_every_token_list_entry_is_used_and_some_are_left_to_work_on(tmp_path, source, calibration_list):
    job = Job(tmp_path, source, DATA_PATH=str(calibration_list))
    sets = job.tokens(TokenRequest(num_samples=None, sequence_length=24, seed=0, validation_samples=3))
    assert (len(sets.train), len(sets.validation)) == (9, 3)
    with pytest.raises(DataError, match="12 sequences, and val_size=12 of them held out leave none"):
        job.tokens(TokenRequest(num_samples=None, sequence_length=24, seed=0, validation_samples=12))


def test_pajama_is_scored_on_windows_of_its_documents_as_c4_is(tmp_path, source):
    rows = [{"text": letter * 40} for letter in "abc"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job(tmp_path, source, CORPORA={"pajama": str(tmp_path / "p.jsonl")}, EVALUATION={"sequence_length": 8})
    tokens = job.corpus("pajama")
    assert tokens.numel() == 256 * 8
    assert all(len(set(window.tolist()) - {window[0].item()}) <= 1 for window in tokens.view(256, 8))


def test_gptq_wikitext_joins_rows_with_nothing_between(tmp_path, source):
    (tmp_path / "w.txt").write_text(" = Title = \n\n First line .\n \n Second . \n")
    job = Job(tmp_path, source, CORPORA={"wikitext2": str(tmp_path / "w.txt")})
    tokens = chunked_wikitext(job.recipe, source, job.workspace)
    assert text_of(tokens[None]) == "^ = Title = \n \n First line .\n \n Second . \n"


def test_scoring_the_calibration_file_is_said(tmp_path, source, caplog):
    (tmp_path / "w.txt").write_text("some text\n")
    job = Job(tmp_path, source, DATASET_NAME="wikitext2", CORPORA={"wikitext2": str(tmp_path / "w.txt")})
    with caplog.at_level(logging.WARNING):
        job.corpus("wikitext2")
    assert "also calibrated on" in caplog.text
