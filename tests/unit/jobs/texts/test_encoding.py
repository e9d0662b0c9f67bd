import pytest
import torch

from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from jobs.texts import encoding
from jobs.texts.encoding import Encoder, tokenizer_digest
from tests.support.byte_model import BOS, EOS, byte_ids, save_tokenizer


@pytest.fixture
def source(tmp_path):
    save_tokenizer(tmp_path)
    return ModelSource(tmp_path, name="tiny")


def test_tokens_are_those_of_the_tokenizer_with_its_own_bos(source):
    encode = Encoder(source)
    assert [tokens.tolist() for tokens in encode(["ab", "é\n"])] == [[BOS, *byte_ids("ab")], [BOS, *byte_ids("é\n")]]
    assert encode.separator == EOS
    assert encode.record == {"digest": encode.digest, "bos": BOS, "eos": EOS, "bos_added": True, "eos_added": False}


def test_very_long_texts_are_encoded_in_parts_to_the_same_tokens(source, monkeypatch):
    text = "first line\nsecond\n" * 5 + "x" * 40
    whole = Encoder(source)([text])[0]
    monkeypatch.setattr(encoding, "LONGEST_CALL", 16)
    assert torch.equal(Encoder(source)([text])[0], whole)


def test_the_digest_follows_the_tokenizer_files(source, tmp_path):
    before = tokenizer_digest(source)
    (tmp_path / "config.json").write_text("{}")
    assert tokenizer_digest(source) == before
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    assert tokenizer_digest(source) != before


def test_a_missing_tokenizer_says_what_else_would_do(tmp_path):
    with pytest.raises(DataError, match=r"MODEL org/m: .* holds no tokenizer .*token tensors \(a .pt file\) as DATA_PATH"):
        Encoder(ModelSource(tmp_path, name="org/m"))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match=r"MODEL org/m: the tokenizer in .* cannot be loaded"):
        Encoder(ModelSource(tmp_path, name="org/m"))
