import json
import logging

import pytest
import torch

from jobs.texts.token_cache import RECORD_FILE, TOKENS_FILE, TokenSets, read_tokens, write_tokens


@pytest.fixture
def sets():
    train = (torch.tensor([[1, 2, 3]]), torch.tensor([[4, 70_000]]))
    return TokenSets(train=train, validation=(torch.tensor([[5, 6, 7, 8]]),), key="k", record={"method": "by hand"})


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


def test_what_is_written_is_read(tmp_path, sets):
    write_tokens(tmp_path, sets)
    found = read_tokens(tmp_path, "k")
    assert equal(found.train, sets.train)
    assert equal(found.validation, sets.validation)
    assert found.record == {"method": "by hand"}
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_no_validation_is_an_empty_tuple(tmp_path, sets):
    write_tokens(tmp_path, TokenSets(train=sets.train, validation=(), key="k", record={}))
    assert read_tokens(tmp_path, "k").validation == ()


def test_another_key_is_a_miss_without_a_warning(tmp_path, sets, caplog):
    write_tokens(tmp_path, sets)
    assert read_tokens(tmp_path, "other") is None
    assert not caplog.records


@pytest.mark.parametrize("damage", ["flipped", "cut", "record", "word", "missing"])
def test_damaged_entries_are_a_miss_with_a_warning_and_are_replaced(tmp_path, sets, caplog, damage):
    write_tokens(tmp_path, sets)
    tokens, record = tmp_path / "k" / TOKENS_FILE, tmp_path / "k" / RECORD_FILE
    content = tokens.read_bytes()
    if damage == "flipped":
        tokens.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        tokens.write_bytes(content[:-4])
    elif damage == "record":
        record.write_text("{")
    elif damage == "word":
        record.write_text(record.read_text().replace("by hand", "by head"))
    else:
        tokens.unlink()
    with caplog.at_level(logging.WARNING):
        assert read_tokens(tmp_path, "k") is None
    assert "tokenising again" in caplog.text
    write_tokens(tmp_path, sets)
    assert equal(read_tokens(tmp_path, "k").train, sets.train)


def test_the_record_is_json_that_a_person_can_read(tmp_path, sets):
    write_tokens(tmp_path, sets)
    assert json.loads((tmp_path / "k" / RECORD_FILE).read_text())["record"] == {"method": "by hand"}
