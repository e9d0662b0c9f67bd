"""The recovery stage: what is left of a model learns the original's distributions, in the shapes that pruning gave it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from algorithms.modeling.source import ModelSource
from algorithms.pruning.flap.algorithm import FlapPruner
from algorithms.pruning.flap.config import FlapConfig
from tests.support.models import confident, save_family
from tests.unit.algorithms.quantization.plugin_runs import base_logits, logits, run

TEXT = {"nsamples": 8, "model_seqlen": 16}
RECOVERY = {"nsamples": 24, "model_seqlen": 16, "val_size": 4, "max_epochs": 8, "batch_size": 4, "lr": 1e-2, "lamb": True}


def _algorithm(**changes):
    keys = {**TEXT, "pruning_ratio": 0.5, "to_finetune": True, "recovery": RECOVERY, **changes}
    return FlapPruner(FlapConfig.model_validate(keys), ("ragged", "padded"))


def _divergence(ours, base):
    theirs = torch.log_softmax(base.double(), -1)
    return (theirs.exp() * (theirs - torch.log_softmax(ours.double(), -1))).sum(-1).mean().item()


@pytest.fixture
def source(tmp_path):
    return ModelSource(confident(save_family(tmp_path / "base", "llama", hidden=64, heads=8)))


def test_it_comes_nearer_to_the_original_in_the_shapes_of_the_pruning(tmp_path, source):
    algorithm = _algorithm()
    assert [spec.name for spec in algorithm.stages()] == ["ranking", "pruning", "recovery", "conversion"]
    _, pruned, recovered, converted = run(algorithm, source, tmp_path / "out")
    base = base_logits(source)
    before, after = (_divergence(logits(algorithm.load(artifact)), base) for artifact in (pruned, recovered))
    assert after < 0.9 * before
    for index in range(2):
        blocks = [load_file(artifact.directory / f"{index}.safetensors") for artifact in (pruned, recovered)]
        assert {name: tensor.shape for name, tensor in blocks[0].items()} == {n: t.shape for n, t in blocks[1].items()}
        assert all(tensor.dtype == torch.float16 for tensor in blocks[1].values())
    torch.testing.assert_close(logits(algorithm.load(converted)), logits(algorithm.load(recovered)), atol=1e-4, rtol=1e-4)
    assert algorithm.bits(recovered) == algorithm.bits(pruned)


def test_its_losses_stand_beside_what_was_pruned(tmp_path, source):
    algorithm = _algorithm()
    _, pruned, recovered, _ = run(algorithm, source, tmp_path / "out")
    facts = json.loads((recovered.directory / "calibration.json").read_text())
    assert facts["ranking"] == json.loads((pruned.directory / "calibration.json").read_text())["ranking"]
    assert len(facts["recovery"]["losses"]) == 8 * 5
    assert facts["recovery"]["losses"][-1] < facts["recovery"]["losses"][0]


def test_a_finished_folder_is_not_tuned_again(tmp_path, source):
    algorithm = _algorithm()
    recovered = run(algorithm, source, tmp_path / "out")[2]
    written = (recovered.directory / "0.safetensors").stat().st_mtime_ns
    again = run(algorithm, source, tmp_path / "out")[2]
    assert again.digest == recovered.digest
    assert (again.directory / "0.safetensors").stat().st_mtime_ns == written


def test_without_to_finetune_there_is_no_such_stage():
    assert [spec.name for spec in _algorithm(to_finetune=False).stages()] == ["ranking", "pruning", "conversion"]
    assert [spec.name for spec in _algorithm(to_finetune=None).stages()] == ["ranking", "pruning", "conversion"]
    assert _algorithm(EPOCHS=0, recovery={}).stages()[2].name == "conversion"
