"""Recovery of pruned models: what they learn, that it resumes with the same bits, and that ranks agree."""

import shutil
from pathlib import Path

import pytest
import torch

from algorithms.base import StageError
from algorithms.finetuning.distillation.loss import kl_divergence
from algorithms.modeling.source import ModelSource
from tests.support.models import token_sequences
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.finetuning.recoveries import original, pruned, recovered, tensors
from tests.unit.algorithms.quantization.aqlm.tunings import KilledError, killed_at

FULL = {"method": "full", "lr": 2e-3}
LORA = {"method": "lora", "lr": 3e-3, "dropout": 0.1}


def _divergence(source, model, sequences):
    """Mean over all tokens, without any of the loop's code but the loss."""
    teacher = source.model_from(source.tensors(source.weight_files, torch.float32))
    with torch.no_grad():
        found = [kl_divergence(model(sequence).logits[0], teacher(sequence).logits[0]) for sequence in sequences]
    return sum(value.item() for value in found) / sum(sequence.numel() for sequence in sequences)


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize(("tied", "changes"), [(False, LORA), (True, FULL)])
def test_a_pruned_model_comes_nearer_to_the_original(tmp_path, family, tied, changes):
    source, sequences = original(tmp_path, family, tied=tied), token_sequences(32, 16)
    before = _divergence(source, pruned(source), sequences)
    context = {"tokens": sequences}
    model, history = recovered(source, tmp_path / "recovery", context=context, max_epochs=4, val_size=4, **changes)
    assert _divergence(source, model, sequences) < 0.85 * before
    assert history.losses[-1] < 0.85 * history.losses[0]
    judged = [entry["divergence"] for entry in history.evaluations]
    assert history.best_divergence == min(judged) < 0.9 * judged[0]


def test_the_first_loss_is_that_of_the_pruned_model(tmp_path):
    source = original(tmp_path)
    expected = _divergence(source, pruned(source), token_sequences(10, 16))
    changes = {"max_epochs": 1, "batch_size": 10, "micro_batch_size": 2, "val_size": 0, "keep_best": False}
    for method in ("full", "lora"):
        _, history = recovered(source, tmp_path / method, method=method, **changes)
        assert history.losses == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({**FULL}, set()),
        ({**FULL, "update_norms": False}, {"norm", "bias"}),
        ({**FULL, "update_embeddings": False}, {"embed_tokens", "lm_head"}),
        ({**LORA, "target_modules": ["q_proj", "mlp.down_proj"]}, {"norm", "bias", "embed", "head", "k_proj", "up_proj"}),
    ],
)
def test_what_is_frozen_does_not_move_and_the_rest_does(tmp_path, changes, still):
    source = original(tmp_path)
    before = tensors(pruned(source), source)
    model, _ = recovered(source, tmp_path / "recovery", keep_best=False, **changes)
    after = tensors(model, source)
    assert {name: tensor.shape for name, tensor in after.items()} == {name: tensor.shape for name, tensor in before.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if not any(part in name for part in still)}
    if changes["method"] == "lora":
        expected = {name for name in expected if name.endswith(("q_proj.weight", "down_proj.weight"))}
    assert moved == expected


@pytest.mark.parametrize("changes", [FULL, LORA])
def test_what_was_set_to_zero_stays_zero(tmp_path, changes, monkeypatch):
    source = original(tmp_path)

    def padded(source):
        model = source.model_from(source.tensors(source.weight_files, torch.float32))
        for name in ("self_attn.v_proj", "mlp.up_proj"):
            model.model.layers[0].get_submodule(name).weight[:5] = 0.0  # what reads these rows stays
        return model

    monkeypatch.setattr("tests.unit.algorithms.finetuning.recoveries.pruned", padded)
    kept, _ = recovered(source, tmp_path / "kept", keeps_zeros=True, keep_best=False, **changes)
    free, _ = recovered(source, tmp_path / "free", keep_best=False, **changes)
    kept, free = (tensors(model, source)["model.layers.0.self_attn.v_proj.weight"] for model in (kept, free))
    assert not kept[:5].any()
    assert kept[5:].any(1).all()
    assert free[:5].any()


@pytest.mark.parametrize("killed", [2, 5])
@pytest.mark.parametrize("changes", [{**FULL, "save_every_steps": 1}, {**LORA, "save_every_steps": 2}])
def test_a_killed_recovery_resumes_with_the_same_bits(tmp_path, killed, changes):
    changes = {**changes, "max_epochs": 3}
    source = original(tmp_path)
    whole, whole_history = recovered(source, tmp_path / "whole", **changes)
    with pytest.raises(KilledError):
        recovered(source, tmp_path / "killed", context={"progress": killed_at(killed)}, **changes)
    resumed, history = recovered(source, tmp_path / "killed", **changes)
    assert history == whole_history
    _assert_same(tensors(resumed, source), tensors(whole, source))


def test_a_rate_that_ruins_everything_leaves_the_start(tmp_path):
    source = original(tmp_path)
    model, history = recovered(source, tmp_path / "recovery", method="full", lr=1.0)
    assert history.best_step == 0
    _assert_same(tensors(model, source), tensors(pruned(source), source))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"micro_batch_size": 1}, {"teacher_cache": 10_000}])
def test_how_it_runs_changes_rounding_alone(tmp_path, changes):
    source = original(tmp_path)
    _, plain = recovered(source, tmp_path / "plain", **LORA)
    _, changed = recovered(source, tmp_path / "changed", **LORA, **changes)
    assert changed.losses == pytest.approx(plain.losses, rel=1e-2 if "teacher_cache" in changes else 1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_size": 10}, "llm.Pruner.recovery.val_size"),
        ({"method": "lora", "target_modules": ["q_proj", "c_attn"]}, "no linear of a block is named c_attn"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(StageError, match=message):
        recovered(original(tmp_path), tmp_path / "recovery", **changes)


def _on_a_rank(ranks, base, folder, killed, changes):
    context = {"ranks": ranks}
    if killed is not None:
        context["progress"] = killed_at(killed)
    source = ModelSource(Path(base))
    try:
        model, history = recovered(source, Path(folder), context=context, **changes)
    except KilledError:
        return None
    return history, tensors(model, source)


def _shared(source, folder, changes, killed=None):
    return run_on_ranks(_on_a_rank, 2, str(source.directory), str(folder), killed, {"save_every_steps": 1, **changes})


@pytest.mark.parametrize("changes", [{**FULL, "max_grad_norm": 0.1}, {**LORA, "micro_batch_size": 1}])
def test_ranks_learn_what_one_process_learns(tmp_path, changes):
    source = original(tmp_path)
    alone, expected = recovered(source, tmp_path / "alone", **changes)
    results = _shared(source, tmp_path / "shared", changes)
    for history, found in results:
        assert history.losses == pytest.approx(expected.losses, rel=1e-3)
        _assert_same(found, results[0][1])
        for name, tensor in tensors(alone, source).items():
            torch.testing.assert_close(found[name], tensor, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("changes", [FULL, LORA])
def test_any_number_of_ranks_goes_on(tmp_path, changes):
    source = original(tmp_path)
    (history, whole), _ = _shared(source, tmp_path / "whole", changes)
    assert _shared(source, tmp_path / "killed", changes, killed=4) == [None, None]
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    (resumed, found), _ = _shared(source, tmp_path / "killed", changes)
    assert resumed == history
    _assert_same(found, whole)
    _, alone = recovered(source, tmp_path / "alone", **changes)
    assert alone.losses[:3] == history.losses[:3]
    assert alone.losses == pytest.approx(history.losses, rel=1e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_ranks_put_the_best_state_back(tmp_path, method):
    source = original(tmp_path)
    start = tensors(pruned(source), source)
    for history, found in _shared(source, tmp_path / "shared", {"method": method, "lr": 1.0}):
        assert history.best_step == 0
        _assert_same(found, start)
