"""Every weight is known to fit before the first block is touched."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from jobs.model_layout import check_layout, check_length
from tests.support.families.cases import save_case
from tests.support.families.strangers import save_stranger
from tests.support.models import save_family

LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path):
    """A model of two blocks, all in one file."""
    folder = tmp_path / "model"
    save_family(folder, "llama", heads=2)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(model, **tensors):
    """Replace tensors of the model; None takes one out."""
    found = {**load_file(model / "model.safetensors"), **tensors}
    kept = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def configure(model, **values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **values}))


def test_a_model_that_is_whole_passes(model, caplog):
    check_layout(ModelSource(model))
    assert caplog.records == []


@pytest.mark.parametrize(
    "name", [LAST, "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
)
def test_a_weight_that_is_not_there_is_named(model, name):
    change(model, **{name: None})
    with pytest.raises(DataError, match=f"has no tensor '{name}'"):
        check_layout(ModelSource(model))


def test_a_weight_of_another_shape_is_named_with_both(model):
    weight = load_file(model / "model.safetensors")[LAST]
    change(model, **{LAST: weight.T})
    rows, columns = weight.shape
    with pytest.raises(
        DataError, match=rf"{LAST} in .*model.safetensors has the shape \[{columns}, {rows}\].*\[{rows}, {columns}\]"
    ):
        check_layout(ModelSource(model))


@pytest.mark.parametrize(("dtype", "said"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64")])
def test_weights_that_are_no_floating_numbers_are_refused(model, dtype, said):
    change(model, **{LAST: torch.ones(load_file(model / "model.safetensors")[LAST].shape).to(dtype)})
    with pytest.raises(DataError, match=f"{LAST} in .* holds {said}"):
        check_layout(ModelSource(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_floating_type_passes(model, dtype):
    change(model, **{LAST: load_file(model / "model.safetensors")[LAST].to(dtype)})
    check_layout(ModelSource(model))
    assert load_file(model / "model.safetensors")[LAST].dtype is dtype


def test_an_index_that_puts_a_tensor_into_another_shard_is_told_so(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file({LAST: tensors.pop(LAST)}, model / "b.safetensors")
    save_file(tensors, model / "a.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys([*tensors, LAST], "a.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=f"the index says that {LAST} is in .*a.safetensors"):
        check_layout(ModelSource(model))


@pytest.mark.parametrize("blocks", [0, -1, 10**9])
def test_a_number_of_blocks_that_cannot_be_is_told_at_once(model, blocks):
    configure(model, num_hidden_layers=blocks)
    with pytest.raises(DataError, match=f"speaks of {blocks} blocks"):
        check_layout(ModelSource(model))


def test_a_block_that_config_json_does_not_count_is_left_out_with_a_warning(model, caplog):
    configure(model, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING):
        check_layout(ModelSource(model))
    assert "weights of block 1" in caplog.text


@pytest.mark.parametrize(
    "values",
    [{"hidden_act": "nope"}, {"num_attention_heads": 0}, {"head_dim": 0}, {"rope_parameters": {"rope_type": "evil"}},
     {"_attn_implementation": "someones/kernel"}, {"dtype": "os.system"}, {"model_type": "nope"}, {"model_type": 3}],
)  # fmt: skip
def test_a_configuration_of_which_no_model_can_be_made_is_named(model, values):
    configure(model, **values)
    with pytest.raises(DataError, match=r"config\.json"):
        check_layout(ModelSource(model))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "4", "\udcff"])
def test_a_configuration_that_is_no_object_is_named(model, text):
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=r"config\.json"):
        check_layout(ModelSource(model))


def test_a_disk_that_fails_is_not_called_a_damaged_configuration(model, monkeypatch):
    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(model / "config.json"))

    monkeypatch.setattr("algorithms.modeling.source.AutoConfig.from_pretrained", fail)
    with pytest.raises(PermissionError):
        check_layout(ModelSource(model))


def test_only_a_tied_head_may_be_left_out(model):
    configure(model, tie_word_embeddings=False)
    change(model, **{"lm_head.weight": None})
    with pytest.raises(DataError, match="no tensor 'lm_head"):
        check_layout(ModelSource(model))
    with pytest.raises(ValueError, match="no tensor 'lm_head"):
        ModelSource(model).load_outside()
    configure(model, tie_word_embeddings=True)
    check_layout(ModelSource(model))
    outside = ModelSource(model).load_outside()
    assert outside.lm_head.weight is outside.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_looked_at_one_by_one(tmp_path, family):
    folder = save_case(tmp_path / "model", family)
    check_layout(ModelSource(folder))
    name = next(name for name in load_file(folder / "model.safetensors") if ".experts.2." in name)
    shape = load_file(folder / "model.safetensors")[name].shape
    for wrong, words in (
        (None, "no tensor"),
        (torch.zeros(3, 5), "shape"),
        (torch.zeros(shape, dtype=torch.int8), "floating"),
    ):
        change(folder, **{name: wrong})
        with pytest.raises(DataError, match=words):
            check_layout(ModelSource(folder))


def test_families_that_the_table_does_not_have_are_compared_too(tmp_path):
    """A block that the weights lack would show when all before it are compressed."""
    whole = ModelSource(save_stranger(tmp_path / "m", "phimoe"))
    check_layout(whole)
    configure(whole.directory, num_hidden_layers=3)
    with pytest.raises(DataError, match=r"has no tensor 'model\.layers\.2\."):
        check_layout(ModelSource(whole.directory))


@pytest.mark.parametrize("embedded", [32, 16])
def test_sequences_that_a_table_of_positions_ends_before_are_refused(tmp_path, embedded):
    """OPT's positions are learned: 257 of them would be looked up behind the table's end. Llama's are computed."""
    source = ModelSource(save_case(tmp_path / "opt", "opt", word_embed_proj_dim=embedded), name="an/opt")
    model = source.model_from(source.tensors(source.weight_files, torch.float32))
    with pytest.raises(IndexError):
        model(torch.ones(1, 257, dtype=torch.int64))
    check_length(source, 256, "Lower it")
    with pytest.raises(DataError, match=r"Lower it: sequences of 257 tokens, and an/opt has 256 positions .*embed_positions"):
        check_length(source, 257, "Lower it")
    check_length(ModelSource(save_family(tmp_path / "llama", "llama")), 257, "Lower it")
