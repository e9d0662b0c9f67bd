import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.errors import DataError
from jobs.checkpoints import convert, files_digest, read_state, state_files
from tests.support.byte_model import save_model, save_tokenizer, tiny_llama


class Module(torch.nn.Linear):
    """Stands for a pickled model."""


@pytest.fixture
def base(tmp_path):
    return save_model(tmp_path / "base", tie_word_embeddings=False)


def forward(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def test_a_state_dict_becomes_a_model_with_the_same_logits(tmp_path, base):
    model = tiny_llama(tie_word_embeddings=False)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    convert([tmp_path / "state.pt"], base, tmp_path / "out", "CUSTOM_MODEL_PATH")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(forward(loaded), forward(model.eval()))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_symlink()


def test_a_tied_head_is_kept_once(tmp_path):
    base = save_model(tmp_path / "base")
    model = tiny_llama()
    assert model.state_dict()["lm_head.weight"].data_ptr() == model.state_dict()["model.embed_tokens.weight"].data_ptr()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    convert([tmp_path / "pytorch_model.bin"], base, tmp_path / "out", "MODEL")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(forward(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), forward(model.eval()))


def test_parts_become_shards_with_an_index(tmp_path, base):
    state = tiny_llama(tie_word_embeddings=False).state_dict()
    names = list(state)
    for number, part in enumerate((names[:5], names[5:]), 1):
        torch.save({name: state[name] for name in part}, tmp_path / f"pytorch_model-0000{number}-of-00002.bin")
    convert(state_files(tmp_path, "MODEL"), base, tmp_path / "out", "MODEL")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index[names[0]] == "model-00001-of-00002.safetensors"
    assert index[names[-1]] == "model-00002-of-00002.safetensors"
    assert set(index) == set(names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in names)


@pytest.mark.parametrize("nesting", ["state_dict", "model", "module."])
def test_nesting_and_prefixes_of_trainers_are_undone(tmp_path, nesting):
    plain = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
    nested = (
        {f"module.{name}": tensor for name, tensor in plain.items()} if nesting == "module." else {nesting: plain, "epoch": 3}
    )
    torch.save(nested, tmp_path / "state.pt")
    found = read_state(tmp_path / "state.pt", "CUSTOM_MODEL_PATH")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a.weight": [1, 1], "b.weight": [0, 0, 0]}


def test_pickled_modules_and_other_things_are_refused(tmp_path):
    torch.save(Module(2, 2), tmp_path / "module.pt")
    with pytest.raises(DataError, match=r"module.pt: not a plain state dict .* save model.state_dict\(\) instead"):
        read_state(tmp_path / "module.pt", "CUSTOM_MODEL_PATH")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(DataError, match=r"list.pt: holds a list, not a state dict of tensors"):
        read_state(tmp_path / "list.pt", "CUSTOM_MODEL_PATH")


def test_a_state_dict_of_another_architecture_is_refused_and_leaves_nothing(tmp_path, base):
    state = tiny_llama(tie_word_embeddings=False).state_dict()
    missing = {name: tensor for name, tensor in state.items() if "layers.1." not in name}
    save_file(missing, tmp_path / "a.safetensors")
    with pytest.raises(
        DataError, match=r"9 of 21 parameters of base are missing, the first model.layers.1.self_attn.q_proj.weight"
    ):
        convert([tmp_path / "a.safetensors"], base, tmp_path / "out", "CUSTOM_MODEL_PATH")
    torch.save(state | {"model.norm.weight": torch.ones(9)}, tmp_path / "b.pt")
    with pytest.raises(DataError, match=r"model.norm.weight has the shape \[9\], but \[8\] in base"):
        convert([tmp_path / "b.pt"], base, tmp_path / "out", "CUSTOM_MODEL_PATH")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.pt", "base"]


def test_two_state_dicts_of_the_same_parameters_are_refused(tmp_path, base):
    for name in ("first.pt", "second.pt"):
        torch.save(tiny_llama().state_dict(), tmp_path / name)
    with pytest.raises(DataError, match=r"second.pt: model.embed_tokens.weight is also in"):
        convert(state_files(tmp_path, "CUSTOM_MODEL_PATH"), base, tmp_path / "out", "CUSTOM_MODEL_PATH")


def test_tensors_that_share_memory_are_written_each(tmp_path):
    base = save_model(tmp_path / "base", tie_word_embeddings=False)
    state = tiny_llama(tie_word_embeddings=False).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "state.pt")
    convert([tmp_path / "state.pt"], base, tmp_path / "out", "CUSTOM_MODEL_PATH")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])


def test_weight_files_of_a_folder(tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", "state.pt"):
        (tmp_path / name).write_bytes(b"x")
    assert state_files(tmp_path, "MODEL") == [tmp_path / "pytorch_model.bin"]
    assert state_files(tmp_path / "state.pt", "CUSTOM_MODEL_PATH") == [tmp_path / "state.pt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds neither config.json nor a state dict"):
        state_files(tmp_path / "empty", "CUSTOM_MODEL_PATH")


def test_the_digest_follows_the_content(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    assert files_digest([tmp_path / "a", tmp_path / "b"]) == files_digest([tmp_path / "c", tmp_path / "b"])
    assert files_digest([tmp_path / "a", tmp_path / "b"]) != files_digest([tmp_path / "b", tmp_path / "a"])


def test_conversion_is_logged(tmp_path, base, caplog):
    torch.save(tiny_llama(tie_word_embeddings=False).state_dict(), tmp_path / "s.pt")
    with caplog.at_level(logging.INFO, logger="jobs.checkpoints"):
        convert([tmp_path / "s.pt"], base, tmp_path / "out", "MODEL")
    assert "Converting 1 file(s) of MODEL to safetensors" in caplog.text


def test_a_config_of_an_unknown_family_is_a_data_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    save_tokenizer(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "s.pt")
    with pytest.raises(DataError, match="names no causal language model that transformers knows"):
        convert([tmp_path / "s.pt"], tmp_path, tmp_path / "out", "MODEL")
