"""Linears that write to the residual stream, in families that add, multiply or lay out otherwise than Llama does."""

import copy

import pytest
import torch
from torch import nn

from algorithms.modeling.activations import embed
from algorithms.modeling.group_walk import GroupWalk
from algorithms.modeling.source import ModelSource
from algorithms.numerics.statistics import InputStatistics
from tests.support.families.cases import save_case
from tests.support.models import token_sequences


class Says(nn.Module):
    """Gives what it was told, batch by batch, whatever it is given."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, inputs):
        return next(self.outputs).reshape(*inputs.shape[:-1], -1)


@pytest.mark.parametrize("name", ["granite", "opt", "cohere2", "falcon", "falcon-two-norms", "gpt_neox", "phi3"])
def test_a_block_whose_writers_give_what_they_are_asked_for_has_the_originals_outputs(tmp_path, monkeypatch, name):
    source = ModelSource(save_case(tmp_path / "m", name))
    row, block = source.architecture, source.load_block(1)
    (reference,) = embed(source, [token_sequences(5, 9)], batch_size=2, device=torch.device("cpu"), offload=True)
    current = reference.copy()
    for place, batch in enumerate(current.batches):
        current.take(place, batch + torch.randn(batch.shape, generator=torch.Generator().manual_seed(place)))
    asked, update = [], InputStatistics.update

    def note(statistics, inputs, wanted=None):
        asked.append(wanted)
        update(statistics, inputs, wanted)

    monkeypatch.setattr(InputStatistics, "update", note)
    original = copy.deepcopy(block)
    with torch.no_grad(), GroupWalk(row, 1, block=block, original=original, current=current, reference=reference) as walk:
        for group in row.input_groups:
            asked.clear()
            walk.statistics(group)
            assert all((wanted is None) == (group[0] not in row.residual_writers) for wanted in asked)
            for linear in group:
                if linear in row.residual_writers:
                    bias = walk.linear(linear).bias
                    walk.replace(linear, Says([wanted + (0 if bias is None else bias) for wanted in asked]))
        found, expected = list(walk.outputs()), list(walk.reference_outputs())
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
