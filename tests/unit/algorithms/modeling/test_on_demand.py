import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from algorithms.modeling.on_demand import folder_on_demand, place, resident, shelf_of, source_on_demand
from algorithms.modeling.source import ModelError, ModelSource
from tests.support.models import save_family

TOKENS = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3", False), ("gemma", True)])
def test_it_computes_what_the_whole_model_does(tmp_path, family, tied):
    folder = save_family(tmp_path / "m", family, tied=tied)
    expected = plain(folder)(TOKENS).logits
    for model in (source_on_demand(ModelSource(folder)), folder_on_demand(ModelSource(folder))):
        assert torch.equal(model(TOKENS).logits, expected)
        assert torch.equal(model(TOKENS).logits, expected), "and again, after the blocks were forgotten"


def test_no_block_stays_in_memory_and_two_are_never_there(tmp_path):
    model = source_on_demand(ModelSource(save_family(tmp_path / "m", "llama", blocks=3)))
    blocks, seen = shelf_of(model).blocks, []

    def look(block, args, output):
        seen.append([not next(other.parameters()).is_meta for other in blocks])

    for block in blocks:
        block.self_attn.register_forward_hook(look)
    model(TOKENS)
    assert seen == [[True, False, False], [False, True, False], [False, False, True]]
    assert all(parameter.is_meta for parameter in blocks.parameters())


def test_a_forward_that_fails_forgets_its_block(tmp_path):
    model = source_on_demand(ModelSource(save_family(tmp_path / "m", "llama")))
    handle = shelf_of(model).blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TOKENS)
    assert all(parameter.is_meta for parameter in shelf_of(model).blocks.parameters())
    handle.remove()
    assert torch.isfinite(model(TOKENS).logits).all()


def test_resident_is_an_ordinary_model(tmp_path):
    folder = save_family(tmp_path / "m", "llama")
    model, expected = resident(source_on_demand(ModelSource(folder))), plain(folder)
    assert shelf_of(model) is None
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert resident(expected) is expected


def test_place_moves_what_is_there(tmp_path):
    model = source_on_demand(ModelSource(save_family(tmp_path / "m", "llama", tied=True)))
    assert place(model, torch.device("meta")).model.embed_tokens.weight.is_meta
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert shelf_of(model).device.type == "meta"


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weights_that_do_not_fit_are_named(tmp_path, change):
    folder = save_family(tmp_path / "m", "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"block 1.*(up_proj|extra)"):
        folder_on_demand(ModelSource(folder))(TOKENS)
