import pytest
import torch
from transformers import AutoModelForCausalLM

from algorithms.modeling.families.table import architecture_for
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.narrowing import Kept, narrow, query_channels, widths
from tests.support.models import FAMILIES, confident, save_family, token_sequences

TOKENS = torch.cat(token_sequences(2, 12))
KEPT = (Kept(groups=(1, 3), neurons=(0, 5, 6, 40, 63)), Kept(groups=(0,), neurons=tuple(range(1, 64, 2))))


def _model(folder, family, **changes):
    saved = confident(save_family(folder, family, heads=8, **changes))
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval().requires_grad_(False)


def _silence(layer, kept, width):
    """Zeros in the columns that read what is to go."""
    channels = {group * width + place for group in kept.groups for place in range(width)}
    layer.self_attn.o_proj.weight[:, [c for c in range(32) if c not in channels]] = 0
    layer.mlp.down_proj.weight[:, [n for n in range(64) if n not in kept.neurons]] = 0


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_nobody_reads_can_go(tmp_path, family):
    model = _model(tmp_path / "model", family)
    whole = model(TOKENS).logits
    for layer, kept in zip(model.model.layers, KEPT, strict=True):
        _silence(layer, kept, width=8)
    silenced = model(TOKENS).logits
    assert (silenced - whole).std() > 0.05 * whole.std()
    for layer, kept in zip(model.model.layers, KEPT, strict=True):
        narrow(layer, architecture_for(family), kept)
        size = widths(layer, architecture_for(family))
        assert (size.groups, size.neurons, size.heads_a_group, size.head_dim) == (len(kept.groups), len(kept.neurons), 2, 4)
    torch.testing.assert_close(model(TOKENS).logits, silenced, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_biases_of_what_goes_go_and_those_of_what_reads_it_stay(tmp_path):
    model = _model(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    layer, kept = model.model.layers[0], KEPT[0]
    before = {name: module.bias.clone() for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
    _silence(layer, kept, width=8)
    silenced = model(TOKENS).logits
    narrow(layer, architecture_for("llama"), kept)
    torch.testing.assert_close(model(TOKENS).logits, silenced, atol=1e-4, rtol=1e-4)
    assert torch.equal(layer.mlp.up_proj.bias, before["mlp.up_proj"][list(kept.neurons)])
    assert torch.equal(layer.self_attn.v_proj.bias, before["self_attn.v_proj"][[4, 5, 6, 7, 12, 13, 14, 15]])
    assert torch.equal(layer.self_attn.o_proj.bias, before["self_attn.o_proj"])


def test_all_that_stays_is_as_it_was(tmp_path):
    source = ModelSource(save_family(tmp_path / "model", "qwen2"))
    block, whole = source.load_block(0), source.load_block(0)
    narrow(block, source.architecture, Kept(groups=(0, 1), neurons=tuple(range(64))))
    expected = whole.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in block.state_dict().items())


def test_a_group_has_the_channels_of_all_its_query_heads(tmp_path):
    source = ModelSource(save_family(tmp_path / "model", "llama"))
    size = widths(source.load_block(0), source.architecture)
    assert (size.groups, size.heads_a_group, size.head_dim) == (2, 2, 8)
    assert query_channels(size, (1,)).tolist() == list(range(16, 32))


@pytest.mark.parametrize("kept", [Kept(groups=(), neurons=(0,)), Kept(groups=(0,), neurons=())])
def test_nothing_at_all_is_refused(tmp_path, kept):
    source = ModelSource(save_family(tmp_path / "model", "llama"))
    with pytest.raises(ValueError, match="at least one group of heads and one neuron"):
        narrow(source.load_block(0), source.architecture, kept)
