"""The finetune stage on tiny models: what it learns, that it resumes, and that ranks agree."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from algorithms.base import Artifact, StageError
from algorithms.finetuning.distillation.loss import kl_divergence
from algorithms.modeling.source import ModelSource
from algorithms.quantization.aqlm.algorithm import Aqlm
from algorithms.quantization.aqlm.config import AqlmConfig
from tests.support.models import FAMILIES, save_family, token_sequences
from tests.support.rank_processes import run_on_ranks
from tests.unit.algorithms.quantization.aqlm.tunings import (
    CALIBRATION,
    TUNING,
    KilledError,
    algorithm_of,
    calibrate,
    context_of,
    killed_at,
    report_of,
    tune,
)


def _divergence(source, model, sequences):
    """Mean over all tokens, without any of the loop's code but the loss."""
    teacher = source.model_from(source.tensors(source.weight_files, torch.float32))
    total = tokens = 0
    with torch.no_grad():
        for sequence in sequences:
            total += kl_divergence(model(sequence).logits[0], teacher(sequence).logits[0]).item()
            tokens += sequence.numel()
    return total / tokens


def _files(artifact):
    return {path.name: path.read_bytes() for path in sorted(artifact.directory.iterdir()) if not path.name.startswith(".")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_tuned_model_is_nearer_to_the_original(tmp_path, family, tied):
    source, calibrated = calibrate(tmp_path, family, tied=tied)
    tuned = tune(source, calibrated, tmp_path / "finetune", max_epochs=8, lr=1e-3, code_lr=0.01)
    algorithm = algorithm_of()
    before, after = (_divergence(source, algorithm.load(artifact), token_sequences(10, 16)) for artifact in (calibrated, tuned))
    assert after < 0.8 * before
    assert algorithm.bits(tuned) == algorithm.bits(calibrated)
    converted = algorithm.stages()[-1].run(context_of(source, tmp_path / "converted"), tuned)
    ours, client = algorithm.load(tuned), algorithm.load(converted)
    sequence = token_sequences(1, 16, seed=4)[0]
    torch.testing.assert_close(client(sequence).logits, ours(sequence).logits, atol=1e-5, rtol=1e-4)


def test_the_first_loss_is_that_of_the_calibrated_model_over_the_whole_batch(tmp_path):
    """No micro-batch is left out: with all sequences in one step, its loss is the divergence of everything."""
    source, calibrated = calibrate(tmp_path)
    tuned = tune(source, calibrated, tmp_path / "finetune", max_epochs=1, batch_size=10, microbatch_size=1)
    expected = _divergence(source, algorithm_of().load(calibrated), token_sequences(10, 16))
    assert report_of(tuned)["losses"] == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("microbatch_size", [1, 4, None])
def test_the_size_of_a_pass_changes_rounding_alone(tmp_path, microbatch_size):
    source, calibrated = calibrate(tmp_path)
    losses = [
        report_of(tune(source, calibrated, tmp_path / str(size), microbatch_size=size, update_codes=False))["losses"]
        for size in (2, microbatch_size)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_padding_never_counts(tmp_path):
    """Sequences of two lengths in one pass give the losses of passes of their own."""
    source, calibrated = calibrate(tmp_path)
    tokens = [sequence[:, : 16 - 5 * (place % 2)] for place, sequence in enumerate(token_sequences(8, 16))]
    losses = []
    for size in (1, 4):
        context = {"tokens": tokens}
        tuned = tune(
            source, calibrated, tmp_path / str(size), context=context, microbatch_size=size, skip_grouping=True,
            update_codes=False,
        )  # fmt: skip
        losses.append(report_of(tuned)["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("killed", [1, 2, 4, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {"save_every_steps": 1},
        {"save_every_steps": 2, "keep_best_model": True, "eval_every_steps": 1},
        {"save_every_steps": 3, "delta_decay": 0.5, "amsgrad": True, "code_beta1": 0.9, "code_adam_16bit": True},
    ],
)
def test_a_killed_tuning_resumes_with_the_same_bits(tmp_path, killed, changes):
    source, calibrated = calibrate(tmp_path)
    whole = tune(source, calibrated, tmp_path / "whole", **changes)
    folder = tmp_path / "killed"
    with pytest.raises(KilledError):
        tune(source, calibrated, folder, context={"progress": killed_at(killed)}, **changes)
    resumed = tune(source, calibrated, folder, **changes)
    assert _files(resumed) == _files(whole)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_kills_have_left_is_no_part_of_the_result(tmp_path):
    source, calibrated = calibrate(tmp_path)
    whole = tune(source, calibrated, tmp_path / "whole")
    folder = tmp_path / "killed"
    for name in (".checkpoint-x", "..checkpoint-1.partial", "..best-1.partial", ".teacher"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.safetensors").write_text("a part of a file")
    tuned = tune(source, calibrated, folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert tuned.digest == whole.digest


@pytest.mark.parametrize("left", [".checkpoint-4", "..checkpoint-4.partial"])
def test_killed_after_its_last_file_a_tuning_is_not_made_again(tmp_path, left):
    source, calibrated = calibrate(tmp_path)
    whole = tune(source, calibrated, tmp_path / "whole")
    (whole.directory / left).mkdir()
    again = tune(source, calibrated, whole.directory, context={"progress": killed_at(1)})
    assert again.digest == whole.digest
    assert not (whole.directory / left).exists()


@pytest.mark.parametrize("missing", ["1.safetensors", "not_quantized_weights.safetensors", "tuning.json"])
def test_a_tuning_of_which_a_file_is_gone_is_made_again(tmp_path, missing):
    source, calibrated = calibrate(tmp_path)
    whole = tune(source, calibrated, tmp_path / "whole")
    expected = _files(whole)
    (whole.directory / missing).unlink()
    with pytest.raises(KilledError):
        tune(source, calibrated, whole.directory, context={"progress": killed_at(3)}, save_every_steps=1)
    assert not (whole.directory / "tuning.json").exists(), "what is there is of two runs"
    assert _files(tune(source, calibrated, whole.directory, save_every_steps=1)) == expected


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path, caplog):
    source, calibrated = calibrate(tmp_path)
    whole = tune(source, calibrated, tmp_path / "whole", save_every_steps=1)
    folder = tmp_path / "killed"
    with pytest.raises(KilledError):
        tune(source, calibrated, folder, context={"progress": killed_at(4)}, save_every_steps=1)
    (file,) = (folder / ".checkpoint-3").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    resumed = tune(source, calibrated, folder, save_every_steps=1)
    assert "is damaged" in caplog.text
    assert _files(resumed) == _files(whole)


def test_the_best_state_is_judged_on_held_out_sequences(tmp_path):
    """A rate that ruins everything leaves the start, which was judged too."""
    source, calibrated = calibrate(tmp_path)
    tuned = tune(source, calibrated, tmp_path / "finetune", keep_best_model=True, lr=0.5, val_size=3)
    report = report_of(tuned)
    assert report["best_step"] == 0
    assert [entry["step"] for entry in report["evaluations"]] == [0, 2, 4]
    before, after = (load_file(artifact.directory / "0.safetensors") for artifact in (calibrated, tuned))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_damaged_best_state_is_not_put_back(tmp_path, caplog):
    source, calibrated = calibrate(tmp_path)
    folder, changes = tmp_path / "finetune", {"keep_best_model": True, "lr": 0.2, "val_size": 3, "save_every_steps": 1}
    with pytest.raises(KilledError):
        tune(source, calibrated, folder, context={"progress": killed_at(3)}, **changes)
    (file,) = (folder / ".best-0").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    tuned = tune(source, calibrated, folder, **changes)
    assert "since that of step 0 is damaged" in caplog.text
    assert report_of(tuned)["best_step"] is None


def test_texts_are_shown_and_decide_nothing(tmp_path):
    source, calibrated = calibrate(tmp_path)
    lines = []
    context = {"evaluate": lambda model: {"text": float(next(model.parameters()).shape[0])}, "metrics": lines.append}
    shown = tune(source, calibrated, tmp_path / "shown", context=context, eval_every_steps=2)
    assert [line["perplexity"] for line in lines if line["event"] == "evaluation"] == [{"text": 259.0}] * 3
    silent = tune(source, calibrated, tmp_path / "silent")
    assert load_file(shown.directory / "1.safetensors").keys() == load_file(silent.directory / "1.safetensors").keys()
    assert (shown.directory / "1.safetensors").read_bytes() == (silent.directory / "1.safetensors").read_bytes()


def test_a_tuning_that_diverges_hands_on_what_it_was_given(tmp_path, caplog):
    source, calibrated = calibrate(tmp_path)
    tuned = tune(source, calibrated, tmp_path / "finetune", lr=1e30, lamb=False, max_epochs=4)
    assert report_of(tuned)["stopped"] is not None
    assert "lower lr" in caplog.text
    before, after = (load_file(artifact.directory / "0.safetensors") for artifact in (calibrated, tuned))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_kept_in_full_is_the_teacher(tmp_path):
    source, calibrated = calibrate(tmp_path)
    live = tune(source, calibrated, tmp_path / "live", update_codes=False)
    cached = tune(source, calibrated, tmp_path / "cached", update_codes=False, teacher_cache=10_000)
    few = tune(source, calibrated, tmp_path / "few", update_codes=False, teacher_cache=8)
    assert report_of(cached)["losses"] == pytest.approx(report_of(live)["losses"], rel=1e-2)
    assert report_of(few)["losses"][0] < report_of(live)["losses"][0]


@pytest.mark.parametrize("skip_grouping", [False, True])
def test_a_cached_teacher_judges_the_held_out_sequences_by_their_own_logits(tmp_path, skip_grouping):
    source, calibrated = calibrate(tmp_path)
    lengths = range(7, 17) if skip_grouping else [16] * 10
    context = {"tokens": [tokens[:, :length] for tokens, length in zip(token_sequences(10, 16), lengths, strict=True)]}
    changes = {"context": context, "update_codes": False, "val_size": 6, "skip_grouping": skip_grouping}
    live = tune(source, calibrated, tmp_path / "live", **changes)
    cached = tune(source, calibrated, tmp_path / "cached", teacher_cache=10_000, **changes)
    found, expected = ([entry["divergence"] for entry in report_of(artifact)["evaluations"]] for artifact in (cached, live))
    assert found == pytest.approx(expected, rel=1e-2)


def test_a_text_that_is_held_out_in_full_is_refused(tmp_path):
    source, calibrated = calibrate(tmp_path)
    with pytest.raises(ValueError, match="val_size"):
        tune(source, calibrated, tmp_path / "finetune", val_size=10)


def test_codes_that_do_not_fit_their_dtype_are_refused(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    blocks = {
        "calibration_config": {**CALIBRATION, "nbits_per_codebook": 9},
        "finetune_config": {**TUNING, "code_dtype": "uint8"},
    }
    with pytest.raises(ValueError, match="code_dtype"):
        Aqlm(AqlmConfig.model_validate(blocks)).preflight(source, ["finetune"])


def test_a_class_to_gather_apart_has_to_be_there(tmp_path):
    source, calibrated = calibrate(tmp_path)
    with pytest.raises(StageError, match=r"no LamaMLP.*LlamaMLP"):
        tune(source, calibrated, tmp_path / "finetune", wrap_separately=["LamaMLP"])


@pytest.mark.parametrize(("code_lr", "is_said"), [(1e-6, True), (3.0, False)])
def test_a_v_step_that_does_nothing_is_said_so(tmp_path, caplog, code_lr, is_said):
    source, calibrated = calibrate(tmp_path)
    tune(source, calibrated, tmp_path / "finetune", code_lr=code_lr)
    assert ("raise code_lr" in caplog.text) is is_said


@pytest.mark.parametrize(
    ("amp", "changes"),
    [
        ("bfloat16", {}),
        ("bfloat16", {"master_dtype": "bfloat16"}),
        ("float16", {"load_dtype": "float16"}),
        ("float16", {"master_dtype": "float16"}),
    ],
)
def test_other_precisions_tune_as_well(tmp_path, amp, changes):
    source, calibrated = calibrate(tmp_path)
    exact = report_of(tune(source, calibrated, tmp_path / "exact"))["losses"]
    other = report_of(tune(source, calibrated, tmp_path / "other", amp_dtype=amp, **changes))["losses"]
    assert all(math.isfinite(loss) for loss in other)
    assert other == pytest.approx(exact, rel=0.2)


SHARED = {"save_every_steps": 1, "keep_best_model": True, "val_size": 3}


def _on_a_rank(ranks, base, calibrated, folder, killed, changes):
    context = {"ranks": ranks}
    if killed is not None:
        context["progress"] = killed_at(killed)
    artifact = Artifact(kind="aqlm-calibration", directory=Path(calibrated), digest="calibrated")
    try:
        tuned = tune(ModelSource(Path(base)), artifact, Path(folder), context=context, **changes)
    except KilledError:
        return None
    return report_of(tuned)["losses"]


def _shared(size, source, calibrated, folder, killed=None, **changes):
    arguments = (str(source.directory), str(calibrated.directory), str(folder), killed, {**SHARED, **changes})
    return run_on_ranks(_on_a_rank, size, *arguments)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        (2, {"minimize_sync": True, "gradient_checkpointing": False, "wrap_separately": ["LlamaMLP"]}),
        (2, {"code_trust_ratio": 0.05, "delta_decay": 1, "max_grad_norm": 0.01}),
        (3, {"microbatch_size": 1, "update_codes": False}),
        (2, {"teacher_cache": 16}),
        (2, {"update_non_quantized_parameters": False}),
        (2, {"update_codebooks_and_scales": False, "update_non_quantized_parameters": False, "force_code_update": True}),
    ],
)
def test_ranks_learn_what_one_process_learns(tmp_path, size, changes):
    source, calibrated = calibrate(tmp_path)
    alone = report_of(tune(source, calibrated, tmp_path / "alone", **{**SHARED, **changes}))["losses"]
    losses = _shared(size, source, calibrated, tmp_path / "shared", **changes)
    assert all(other == losses[0] for other in losses)
    assert losses[0] == pytest.approx(alone, rel=5e-3)


@pytest.mark.parametrize("gathers_in_amp", [False, True])
def test_ranks_tune_in_other_precisions(tmp_path, gathers_in_amp):
    source, calibrated = calibrate(tmp_path)
    changes = {"amp_dtype": "bfloat16", "use_fsdp_amp": gathers_in_amp, "straight_through_buffer_dtype": "bfloat16"}
    alone = report_of(tune(source, calibrated, tmp_path / "alone", **{**SHARED, "amp_dtype": "bfloat16"}))["losses"]
    losses = _shared(2, source, calibrated, tmp_path / "shared", **changes)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_tuning_goes_on_with_another_number_of_ranks(tmp_path, before, after):
    source, calibrated = calibrate(tmp_path)
    alone = report_of(tune(source, calibrated, tmp_path / "alone", **SHARED))["losses"]
    folder = tmp_path / "shared"
    _shared(before, source, calibrated, folder, killed=3)
    assert (folder / ".checkpoint-2").is_dir()
    losses = _shared(after, source, calibrated, folder)
    assert losses[0][:2] == pytest.approx(alone[:2], rel=1e-3)
    assert losses[0] == pytest.approx(alone, rel=5e-3)
