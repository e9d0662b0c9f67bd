"""Models that are ill: every method ends with numbers in its result, and says what it had to do for that."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.faults.kill import job_of
from tests.support.models import save_family

TEXT = "What a model is made of, and what is left of it when it is ill.\n" * 20
FEW = {"nsamples": 2, "model_seqlen": 16}
METHODS = {
    "AQLM": {
        "calibration_config": {**FEW, "val_size": 0, "num_codebooks": 1, "nbits_per_codebook": 4, "in_group_size": 4,
                               "init_max_iter": 2, "max_epochs": 1, "finetune_max_epochs": 1},
        "finetune_config": None,
    },
    "GPTQ": {**FEW, "wbits": 4, "groupsize": 16},
    "SpQR": {**FEW, "wbits": 3, "groupsize": 16},
    "AutoAWQ": {**FEW, "W_BIT": 4, "Q_GROUP_SIZE": 16},
    "LMQuant": {**FEW, "quant_type": "w4a8kv4_sym", "quant": {"wgts": {"group_shapes": [[1, 32]]}}},
    "FlapPruner": {**FEW},
}  # fmt: skip


def dead(tensors):
    """Channels that carry nothing: their norm is zero, and so is a head's output."""
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[:8] = 0
        if "v_proj" in name:
            tensor[:8] = 0


def constant(tensors):
    """Rows whose weights are all the same, and rows of nothing."""
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor[:4] = 0.5
            tensor[4:6] = 0


def loud(tensors):
    """Float16 still holds every weight, but what flows through the first block is beyond what a Hessian in float32 holds."""
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(6e4)
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"][:2] = 5e3


ILLNESSES = {"dead": dead, "constant": constant, "loud": loud}


def recipe(folder: Path, method: str) -> Path:
    text = folder / "text.txt"
    text.write_text(TEXT)
    keys = {
        "ALGORITHM": method, "JOB_ID": "ill", "USER_FOLDER": str(folder / "user"), "MODEL": str(folder / "model"),
        "DATA_PATH": str(text), "EXPORT": ["padded" if method == "FlapPruner" else "dense"], "llm": {method: METHODS[method]},
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def ill_model(folder: Path, illness: str = "") -> None:
    save_family(folder / "model", "llama", heads=2)
    (file,) = (folder / "model").glob("*.safetensors")
    tensors = load_file(file)
    if illness:
        ILLNESSES[illness](tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def finite_result(folder: Path) -> list[str]:
    """The warnings of the stages of a job whose every stored number is one."""
    job = job_of(folder / "user")
    for file in [*job.glob("*.safetensors"), *(job / "tmp").rglob("[0-9].safetensors")]:
        for name, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), f"{name} in {file}"
    stages = json.loads((job / "manifest.json").read_text())["stages"]
    return [warning for stage in stages.values() for warning in stage["warnings"]]


@pytest.mark.parametrize("illness", ILLNESSES)
@pytest.mark.parametrize("method", METHODS)
def test_an_ill_model_ends_with_numbers(run_main, tmp_path, method, illness):
    ill_model(tmp_path, illness)
    done = run_main("--yaml_path", str(recipe(tmp_path, method)))
    if (method, illness) == ("LMQuant", "loud"):  # the rotation makes one number of two that float16 holds, and it does not
        assert done.code == 2
        assert "beyond float16's 65504" in done.said.strip().splitlines()[-1]
        return
    assert done.code == 0, done.said[-3000:]
    warnings = finite_result(tmp_path)
    assert any("left out" in warning for warning in warnings) == (illness == "loud"), warnings
    assert (illness == "loud") == ("left out" in (job_of(tmp_path / "user") / "report.html").read_text())


def test_a_block_tuning_that_diverges_is_undone(run_main, tmp_path):
    ill_model(tmp_path)
    changes = [f"llm.AQLM.calibration_config.finetune_{key}" for key in ("lr=1e30", "max_epochs=2")]
    done = run_main("--yaml_path", str(recipe(tmp_path, "AQLM")), *changes)
    assert done.code == 0, done.said[-3000:]
    assert any("good parameters are restored" in warning for warning in finite_result(tmp_path)), done.said[-3000:]


def test_a_learned_rounding_with_the_largest_steps_ends_with_numbers(run_main, tmp_path):
    ill_model(tmp_path, "constant")
    tuning = "{rounding_step: 1.0, scale_step: 1.0, other_step: 1.0, keep_best: false}"
    done = run_main("--yaml_path", str(recipe(tmp_path, "GPTQ")), f"llm.GPTQ.block_tuning={tuning}")
    assert done.code == 0, done.said[-3000:]
    finite_result(tmp_path)


def test_a_tuning_of_the_whole_model_that_diverges_hands_the_calibration_on(run_main, tmp_path):
    ill_model(tmp_path)
    shape = "model_seqlen: 16, nsamples: 8, val_size: 2, max_epochs: 3, batch_size: 2, microbatch_size: 2"
    tuning = f"{{{shape}, lr: 1e30, code_lr: 1e30}}"
    done = run_main("--yaml_path", str(recipe(tmp_path, "AQLM")), f"llm.AQLM.finetune_config={tuning}")
    assert done.code == 0, done.said[-3000:]
    assert finite_result(tmp_path), "the report says what happened"
