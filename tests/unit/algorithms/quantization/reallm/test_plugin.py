from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats.client import load as client_load
from algorithms.formats.own.packed_linear import PackedLinear
from algorithms.modeling.source import ModelSource
from tests.support.models import FAMILIES, confident, save_family
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.quantization.plugin_runs import (
    assert_resumes,
    base_logits,
    blocks,
    calibrate,
    export_folder,
    logits,
    run,
    run_stage,
)
from tests.unit.algorithms.quantization.reallm.reallm_runs import BLOCK_TUNING, GLOBAL_TUNING, facts, reallm, weights

TUNED = {"block_tuning": BLOCK_TUNING, "global_tuning": GLOBAL_TUNING}
ALL = ("dense", "reallm", "peft")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_format_computes_the_model_that_was_made(tmp_path, family):
    source = ModelSource(save_family(tmp_path / "base", family, tied=family == "gemma"))
    algorithm = reallm(ALL)
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours, base = logits(algorithm.load(calibrated)), base_logits(source)
    assert 0.0 < (ours - base).std() / base.std() < 0.6
    packed = client_load("reallm", export_folder(converted, algorithm, "reallm"))
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 2 * len(source.architecture.linears)
    torch.testing.assert_close(logits(packed), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(client_load("dense", converted.directory)), ours, atol=5e-3, rtol=5e-3)
    other = replace(converted, directory=export_folder(converted, algorithm, "reallm"))
    torch.testing.assert_close(logits(algorithm.load(other)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"rank": 0}, {"residual": "nf"}, {"residual": "nf", "target_bits": 6.0}])
def test_peft_goes_on_from_the_same_model(tmp_path, changes):
    pytest.importorskip("peft", reason="peft is not installed: its adapter cannot be loaded")
    source = ModelSource(save_family(tmp_path / "base", "llama", attention_bias=True))
    algorithm = reallm(ALL, **changes)
    *_, calibrated, converted = run(algorithm, source, tmp_path / "out")
    folder = export_folder(converted, algorithm, "peft")
    model = client_load("peft", folder)
    ours = logits(algorithm.load(calibrated))
    torch.testing.assert_close(logits(model), ours, atol=5e-3, rtol=5e-3)
    bare = logits(client_load("dense", folder / "base"))
    assert (bare - ours).std() > (0.0 if changes.get("rank") == 0 else 0.01) * ours.std()
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    training = PeftModel.from_pretrained(base, folder, is_trainable=True)
    moving = {name for name, parameter in training.named_parameters() if parameter.requires_grad}
    assert len(moving) == 3 * 2 * len(source.architecture.linears)
    training(input_ids=torch.arange(3, 19)[None], labels=torch.arange(3, 19)[None]).loss.backward()
    gradients = [parameter.grad for parameter in training.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": "nf", "num_bits": 3},
        {"residual": "aqlm"},
        {"permute": True, "low_rank_bits": 16},
        {"targets": "compressed_prefix"},
    ],
)
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    assert_resumes(reallm(**changes), source, tmp_path)


def test_a_killed_tuning_resumes_at_its_block_with_the_same_result(tmp_path):
    from tests.unit.algorithms.quantization.plugin_runs import KilledError, killed_at

    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    algorithm = reallm(block_tuning=BLOCK_TUNING)
    calibrated = calibrate(algorithm, source, tmp_path / "calibration")
    whole = run_stage(algorithm, source, tmp_path / "whole", "finetune_bloc", calibrated)
    with pytest.raises(KilledError):
        run_stage(algorithm, source, tmp_path / "broken", "finetune_bloc", calibrated, killed_at(2))
    kept = (tmp_path / "broken" / "1.safetensors").stat().st_mtime_ns
    again = run_stage(algorithm, source, tmp_path / "broken", "finetune_bloc", calibrated)
    assert (tmp_path / "broken" / "1.safetensors").stat().st_mtime_ns == kept
    assert again.digest == whole.digest or blocks(again, "linears") == blocks(whole, "linears")
    for index in range(3):
        expected, found = (load_file(made.directory / f"{index}.safetensors") for made in (whole, again))
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_each_stage_comes_nearer_to_the_original(tmp_path):
    source = ModelSource(confident(save_family(tmp_path / "base", "llama")))
    whole = {"nsamples": 64, "model_seqlen": 16, "max_epochs": 3, "batch_size": 8, "val_size": 8}
    algorithm = reallm(block_tuning={"max_epochs": 6, "batch_size": 2}, global_tuning=whole)
    assert [(spec.name, spec.directory) for spec in algorithm.stages()] == [
        ("calibration", "calibration"),
        ("finetune_bloc", "finetune_bloc"),
        ("finetune_global", "finetune_global"),
        ("conversion", "converted"),
    ]
    calibrated, by_block, as_a_whole, converted = run(algorithm, source, tmp_path / "out")
    errors = [
        sum(report["linears"][name]["relative_error"] for name in report["linears"]) for report in facts(calibrated)["blocks"]
    ]
    assert all(0 < error < 7 for error in errors)
    losses = [report["tuning"]["validation_losses"] for report in facts(by_block)["blocks"]]
    assert sum(min(series) for series in losses) < sum(series[0] for series in losses)
    evaluations = [entry["divergence"] for entry in facts(as_a_whole)["global_tuning"]["evaluations"]]
    assert min(evaluations) < evaluations[0]
    assert (tmp_path / "out" / "finetune_bloc" / "0.safetensors").is_file()
    assert algorithm.bits(by_block) == algorithm.bits(calibrated) == algorithm.bits(as_a_whole) == algorithm.bits(converted)
    ours = logits(algorithm.load(as_a_whole))
    torch.testing.assert_close(logits(algorithm.load(converted)), ours, atol=5e-3, rtol=5e-3)


def test_without_a_refit_codes_stay_and_with_one_linears_learn_of_their_new_inputs(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    made = {}
    for refit in (False, True):
        algorithm = reallm(block_tuning={**BLOCK_TUNING, "refit": refit, "keep_best": False, "low_rank_step": 0.1})
        made[refit] = run(algorithm, source, tmp_path / str(refit))
    for name, weight in weights(made[False][0], 1).items():
        tuned = weights(made[False][1], 1)[name]
        assert torch.equal(tuned.residual.codes, weight.residual.codes)
        assert not torch.equal(tuned.low_rank.up, weight.low_rank.up)
        assert not torch.equal(tuned.magnitude, weight.magnitude)
    changed = [
        not torch.equal(weights(made[True][1], 1)[name].residual.codes, weight.residual.codes)
        for name, weight in weights(made[True][0], 1).items()
    ]
    assert any(changed)


@pytest.mark.parametrize("tuned", [{}, TUNED])
def test_bits_are_those_of_the_stored_tensors(tmp_path, tuned):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = reallm(permute=True, **tuned)
    *_, last, converted = run(algorithm, source, tmp_path / "out")
    stored = parameters = 0
    for index in range(2):
        tensors = load_file(last.directory / f"{index}.safetensors")
        inside = [name for name in tensors if "norm" not in name]
        stored += sum(8 * tensors[name].numel() * tensors[name].element_size() for name in inside)
        parameters += sum(weight.dequantize().numel() for weight in weights(last, index).values())
    bits = dict(algorithm.bits(converted))
    assert bits.pop("parameters") == parameters
    assert sum(bits.values()) == stored
    assert bits["codes"] == 2 * parameters
    # Two bytes for every column in every block of 64 rows: here each matrix is one block.
    assert bits["permutation"] == 16 * 2 * (6 * 32 + 64)


def test_what_cannot_be_made_is_refused_before_any_stage(tmp_path):
    with pytest.raises(ValueError, match=r"EXPORT: .*\[dense, peft\]"):
        reallm(("peft",)).preflight(None, ["calibration"])
    reallm(("dense", "peft")).preflight(ModelSource(save_family(tmp_path, "llama")), ["calibration"])


@pytest.mark.parametrize("changes", [{"target_bits": 6.0, "residual": "nf"}, TUNED])
def test_two_ranks_make_as_good_a_model_as_one_process_makes(tmp_path, changes):
    folder = save_family(tmp_path / "base", "llama")
    alone = run(reallm(**changes), ModelSource(folder), tmp_path / "alone")
    run_on_ranks(_stages, 2, str(folder), str(tmp_path / "shared"), changes)
    algorithm = reallm(**changes)
    shared = replace(alone[-2], directory=tmp_path / "shared" / alone[-2].directory.name)
    # Sums over ranks round differently, and one code that turns turns others: not the same model, but one as good.
    ours, theirs = (logits(algorithm.load(made)) - base_logits(ModelSource(folder)) for made in (alone[-2], shared))
    assert theirs.std() < 1.25 * ours.std()
    assert algorithm.bits(shared)["parameters"] == algorithm.bits(alone[-2])["parameters"]
    errors = [
        sum(one["relative_error"] for report in facts(made)["blocks"] for one in report["linears"].values())
        for made in (alone[-2], shared)
    ]
    assert errors[1] < 1.2 * errors[0]


def _stages(ranks, folder, out, changes):
    from pathlib import Path

    from algorithms.base import Artifact

    source, algorithm = ModelSource(Path(folder)), reallm(**changes)
    artifact = Artifact(kind="model", directory=source.directory, digest="base")
    for spec in algorithm.stages()[:-1]:
        artifact = run_stage(algorithm, source, Path(out) / spec.directory, spec.name, artifact, ranks=ranks)
