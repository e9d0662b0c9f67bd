import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from algorithms.modeling.families.table import architecture_for
from algorithms.modeling.source import ModelSource
from tests.support.models import FAMILIES, save_family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_and_surroundings_hold_the_stored_values(tmp_path, family, tied):
    source = ModelSource(save_family(tmp_path / "m", family, tied=tied))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for index in range(2):
        block = source.load_block(index)
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, stored[f"model.layers.{index}.{name}"])
    outside = source.load_outside()
    assert torch.equal(outside.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    head = stored["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(outside.get_output_embeddings().weight, head)
    assert all(parameter.is_meta for parameter in outside.model.layers.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_its_own_weights_gives_the_same_logits(tmp_path, family):
    source = ModelSource(save_family(tmp_path / "m", family, tied=family == "qwen3"))
    tokens = torch.arange(3, 40)[None]
    ours = source.model_from(source.tensors(source.weight_files))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_sharded_weights_are_read_through_their_index(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    model.save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert (tmp_path / "s" / "model.safetensors.index.json").is_file()
    sharded = ModelSource(tmp_path / "s")
    assert sharded.num_parameters == source.num_parameters == sum(p.numel() for p in model.parameters())
    assert torch.equal(sharded.load_block(1).mlp.up_proj.weight, source.load_block(1).mlp.up_proj.weight)


def test_a_missing_shard_is_named(tmp_path):
    save_family(tmp_path / "m", "llama")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        _ = ModelSource(tmp_path / "m").weight_files


def test_nan_weights_and_missing_tensors_are_named(tmp_path):
    folder = save_family(tmp_path / "m", "llama")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    broken = {**stored, name: stored[name].clone()}
    broken[name][0, 0] = torch.nan
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        ModelSource(folder).load_block(1)
    broken.pop(name)
    save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no tensor"):
        ModelSource(folder).load_block(1)


def test_the_digest_follows_the_content(tmp_path):
    first = ModelSource(save_family(tmp_path / "a", "llama")).digest
    assert ModelSource(save_family(tmp_path / "b", "llama")).digest == first
    assert ModelSource(save_family(tmp_path / "c", "llama", hidden=64)).digest != first


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ValueError, match="llama, mistral, qwen2, qwen3, gemma"):
        architecture_for("mamba")
