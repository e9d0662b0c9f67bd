"""Narrow blocks of the dense families against whole ones in which nobody reads what is to go."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from algorithms.modeling.on_demand import resident
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.narrowing import (
    Kept,
    attention_output,
    narrow,
    narrowed_on_demand,
    neuron_output,
    obstacle,
    widths,
)
from tests.support.families.cases import save_case
from tests.support.models import token_sequences

TOKENS = torch.cat(token_sequences(2, 12))
GATED = ("gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere2", "smollm3", "seed_oss")
KEPT = (Kept(groups=(1,), neurons=(0, 5, 6, 40, 63)), Kept(groups=(0,), neurons=tuple(range(1, 64, 2))))


@pytest.mark.parametrize("name", GATED)
@torch.no_grad()
def test_what_nobody_reads_can_go(tmp_path, name):
    folder = save_case(tmp_path / "m", name)
    source = ModelSource(folder)
    row, model = source.architecture, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    blocks = model.get_submodule(row.blocks)
    for block, kept in zip(blocks, KEPT, strict=True):
        channels = {group * 16 + place for group in kept.groups for place in range(16)}
        block.get_submodule(attention_output(row)).weight[:, [c for c in range(32) if c not in channels]] = 0
        block.get_submodule(neuron_output(row)).weight[:, [n for n in range(64) if n not in kept.neurons]] = 0
    silenced, stored = model(TOKENS).logits, []
    for block, kept in zip(blocks, KEPT, strict=True):
        narrow(block, row, kept)
        size = widths(block, row)
        assert (size.groups, size.neurons) == (2 if name == "olmo2" else 1, len(kept.neurons))
        stored.append({path: tensor.clone() for path, tensor in block.named_parameters()})
    torch.testing.assert_close(model(TOKENS).logits, silenced, atol=1e-4, rtol=1e-4)
    outside = {path: tensor for path, tensor in model.named_parameters() if not path.startswith(f"{row.blocks}.")}
    read = resident(narrowed_on_demand(source, outside, stored.__getitem__))
    torch.testing.assert_close(read(TOKENS).logits, silenced, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "falcon"])
def test_what_cannot_be_narrowed_says_why(tmp_path, name):
    assert "no gated feed-forward part" in obstacle(ModelSource(save_case(tmp_path / "m", name)).architecture)
