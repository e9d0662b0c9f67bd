import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from algorithms.formats.gguf.file import write
from algorithms.modeling.source import ModelSource
from tests.support.byte_model import save_model

gguf = pytest.importorskip("gguf")

DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


def prepared(folder: Path, **changes: object) -> Path:
    """A model folder whose tokenizer has two merges, and other changes."""
    save_model(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"Zw": 259, "xk": 260}
    tokenizer["model"]["merges"] = [["Z", "w"], ["x", "k"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes))
    return folder


def fields_of(tmp_path: Path, origin: Path) -> dict:
    """The metadata of the file that is written for a model folder."""
    source = ModelSource(origin)
    (tmp_path / "out").mkdir()
    tensors = source.tensors(source.weight_files).items()
    config = source.raw_config() | {"vocab_size": 262}
    file = write(tmp_path / "out", source_config=config, tensors=tensors, tokenizer_folder=origin)
    return gguf.GGUFReader(file).fields


def test_transformers_reads_our_tokens_from_the_file(tmp_path):
    fields = fields_of(tmp_path, prepared(tmp_path / "m"))
    text = "Zwölf Boxkämpfer, 12!"
    ours = ModelSource(tmp_path / "m").tokenizer()(text)["input_ids"]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours[1:]
    assert {259, 260} <= set(ours)
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.bos_token_id"].contents() == ours[0]
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.tokens"].contents()[259:] == ["Zw", "xk", "[PAD261]"]


def llama3() -> pre_tokenizers.PreTokenizer:
    """Llama 3's way to cut a text, as transformers spells it."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    split = pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(("kind", "name"), [(lambda: DIGITS, "smollm"), (llama3, "llama-bpe")])
def test_ways_to_cut_a_text_are_known_by_name(tmp_path, kind, name):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = kind()
    cut = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert fields_of(tmp_path, prepared(tmp_path / "m", pre_tokenizer=cut))["tokenizer.ggml.pre"].contents() == name


UNKNOWN = [
    None,
    {"type": "Whitespace"},
    {"type": "Split", "pattern": {"Regex": "a+"}},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
]


@pytest.mark.parametrize("pre_tokenizer", UNKNOWN)
def test_a_tokenizer_that_llama_cpp_cannot_name_is_left_out(tmp_path, caplog, pre_tokenizer):
    fields = fields_of(tmp_path, prepared(tmp_path / "m", pre_tokenizer=pre_tokenizer))
    assert "no byte-level BPE that llama.cpp has a name for" in caplog.text
    assert "tokenizer.ggml.tokens" not in fields


def test_a_folder_without_tokenizer_is_no_obstacle(tmp_path, caplog):
    fields = fields_of(tmp_path, save_model(tmp_path / "m", tokenizer=False))
    assert "there is no tokenizer.json" in caplog.text
    assert "tokenizer.ggml.tokens" not in fields
