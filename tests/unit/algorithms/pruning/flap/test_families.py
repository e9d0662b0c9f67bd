"""What stands in for least squares where norms follow attention and MLP."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from algorithms.modeling.source import ModelSource
from tests.support.families.cases import save_case
from tests.unit.algorithms.pruning.flap.pruner_runs import pruner
from tests.unit.algorithms.quantization.plugin_runs import run


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_means_of_what_goes_become_biases(tmp_path, caplog, family):
    source = ModelSource(save_case(tmp_path / "m", family))
    with caplog.at_level(logging.WARNING):
        ranking, pruned, _ = run(pruner(("padded",), structure="UL-UM", pruning_ratio=0.5), source, tmp_path / "asked")
    assert "biases for the means of what goes" in caplog.text
    other = run(pruner(("padded",), structure="UL-UM", pruning_ratio=0.5, compensation="bias"), source, tmp_path / "bias")[1]
    means = load_file(ranking.directory / "means.safetensors")
    for index in range(2):
        found, expected = (load_file(at.directory / f"{index}.safetensors") for at in (pruned, other))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        gone, name = means[f"{index}.self_attn.o_proj"], f"model.layers.{index}.self_attn.o_proj.weight"
        original = source.tensors([name])[name]
        sums = [original[:, start : start + 16] @ gone[start : start + 16] for start in (0, 16)]
        assert any(torch.allclose(found["self_attn.o_proj.bias"].float(), one, atol=2e-3) for one in sums)
