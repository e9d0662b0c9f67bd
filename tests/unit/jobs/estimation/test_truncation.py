"""A truncated model computes what the whole one does when the rest of its blocks are taken out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from algorithms.modeling.on_demand import resident, source_on_demand
from algorithms.modeling.source import ModelSource
from jobs.estimation.truncation import write_truncated
from tests.support.families.cases import save_case
from tests.support.models import FAMILIES, save_family, token_sequences


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_without_its_later_blocks(tmp_path, family, tied):
    whole = save_family(tmp_path / "whole", family, blocks=3, tied=tied)
    folder = write_truncated(ModelSource(whole), 2, tmp_path / "truncated")
    reference = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    del reference.model.layers[2:]
    reference.config.num_hidden_layers = 2
    truncated = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (tokens,) = token_sequences(1, 12)
    with torch.no_grad():
        expected, found = (model(input_ids=tokens, use_cache=False).logits for model in (reference, truncated))
    assert torch.equal(found, expected)
    source = ModelSource(folder)
    assert source.num_blocks == 2
    assert not [name for name in source.weight_files if name.startswith("model.layers.2.")]
    assert set(source.outside_names()) == set(ModelSource(whole).outside_names())
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == AutoTokenizer.from_pretrained(whole)("ab")["input_ids"]


def test_lists_with_an_entry_a_block_are_cut_and_weights_are_links(tmp_path):
    whole = save_family(tmp_path / "whole", "qwen3", blocks=3)
    config = json.loads((whole / "config.json").read_text())
    assert len(config["layer_types"]) == 3, "the test needs such a list"
    folder = write_truncated(ModelSource(whole), 1, tmp_path / "truncated")
    cut = json.loads((folder / "config.json").read_text())
    assert cut["layer_types"] == config["layer_types"][:1]
    assert {key for key in config if config[key] != cut[key]} == {"layer_types", "num_hidden_layers"}
    weights = list(folder.glob("*.safetensors"))
    assert weights
    assert all(path.is_symlink() for path in weights)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_a_mixture_keeps_the_experts_of_its_first_blocks(tmp_path, family, apart):
    whole = save_case(tmp_path / "whole", family, blocks=3)
    reference = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    if not apart:
        whole = tmp_path / "together"
        reference.save_pretrained(whole, save_original_format=False)
    del reference.model.layers[2:]
    truncated = AutoModelForCausalLM.from_pretrained(
        write_truncated(ModelSource(whole), 2, tmp_path / "truncated"), dtype=torch.float32
    )
    ours = resident(source_on_demand(ModelSource(tmp_path / "truncated")))
    (tokens,) = token_sequences(1, 12)
    with torch.no_grad():
        expected, *found = (model(input_ids=tokens, use_cache=False).logits for model in (reference, truncated, ours))
    assert all(torch.equal(logits, expected) for logits in found)
