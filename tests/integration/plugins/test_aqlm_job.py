"""The quickstart's model and text through main.py with the real plugin, the real data and the real client, made small."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[3]
SMALL = {
    "nsamples": 12,
    "val_size": 4,
    "model_seqlen": 64,
    "nbits_per_codebook": 4,
    "max_epochs": 2,
    "init_max_iter": 3,
    "finetune_max_epochs": 1,
}


def _command(folder, *overrides):
    command = [sys.executable, "main.py", "--yaml_path", "examples/quickstart/recipe.yaml", f"USER_FOLDER={folder}"]
    command += ["EVALUATION.max_tokens=1024", "EVALUATION.sequence_length=64"]
    return [*command, *(f"llm.AQLM.calibration_config.{key}={value}" for key, value in SMALL.items()), *overrides]


def _run(folder, *overrides, check=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        _command(folder, *overrides), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def _job(folder):
    return folder / "jobs" / "Kompress" / "quickstart"


def _weights(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for directory in (_job(folder), _job(folder) / "tmp" / "calibration")
        for path in directory.glob("*.safetensors")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, _run(folder)


def test_the_job_leaves_a_certified_model_that_loads(finished):
    folder, said = finished
    job = _job(folder)
    certificate = json.loads((job / "certificate.json").read_text())
    assert "passed" in json.dumps(certificate)
    assert "failed" not in json.dumps(certificate)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (job / name).is_file(), name
    config = json.loads((job / "config.json").read_text())
    assert config["quantization_config"]["linear_weights_not_to_quantize"] == ["lm_head", "lm_head.weight"]
    assert config["torch_dtype"] == config["dtype"] == "float16"
    model = AutoModelForCausalLM.from_pretrained(job, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()
    stages = json.loads((job / "manifest.json").read_text())["stages"]
    assert [stages[name]["status"] for name in ("calibration", "conversion")] == ["finished", "finished"]
    assert stages["calibration"]["user_cpu_s"] > 0
    assert "bits per compressed weight" in said


def test_both_texts_of_the_folder_are_calibrated_on(finished):
    (record,) = _job(finished[0]).glob("tmp/tokenized_dataset/*/record.json")
    files = json.loads(record.read_text())["record"]["text"]["files"]
    assert [Path(file).name for file in files] == ["gsm8k_train.jsonl", "wikitext2_valid.jsonl"]


def test_a_second_run_reuses_everything(finished):
    folder, _ = finished
    before = _weights(folder)
    assert "reuse" in _run(folder)
    assert _weights(folder) == before


def test_killed_in_the_middle_of_a_block_it_resumes_and_ends_with_the_same_model(finished, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _command(tmp_path), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = _job(tmp_path) / "tmp" / ".calibration.partial"
    deadline = time.monotonic() + 120
    while not (partial / "1.json").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = (partial / "0.safetensors").stat().st_mtime_ns
    assert not (_job(tmp_path) / "config.json").exists()
    _run(tmp_path)
    assert (_job(tmp_path) / "tmp" / "calibration" / "0.safetensors").stat().st_mtime_ns == kept
    assert _weights(tmp_path) == _weights(finished[0])


def test_a_wrong_code_in_the_export_fails_the_certificate(finished, tmp_path):
    from algorithms.base import Artifact
    from algorithms.quantization.aqlm.algorithm import Aqlm
    from algorithms.quantization.aqlm.config import AqlmConfig
    from jobs.reporting.certificate import Verdict, certify

    job = _job(finished[0])
    algorithm = Aqlm(AqlmConfig(finetune_config=None))
    calibrated = Artifact(kind="aqlm-calibration", directory=job / "tmp" / "calibration", digest="")
    windows = torch.randint(3, 2000, (2, 24), generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / name).write_bytes((job / name).read_bytes())
    tensors = load_file(job / "model.safetensors")
    verdicts = []
    for change in (0, 1):
        tensors["model.layers.0.self_attn.q_proj.codes"][:8] ^= change
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (verdict,) = certify({"aqlm": folder}, windows, lambda _: algorithm.load(calibrated), scratch_dir=tmp_path / "scratch")
        verdicts.append(verdict.verdict)
    assert verdicts == [Verdict.PASSED, Verdict.FAILED]


def test_a_calibration_on_one_text_serves_a_conversion_under_another(finished, tmp_path):
    _run(tmp_path, "STAGES=[calibration]")
    other = tmp_path / "other.txt"
    other.write_text("A text that nothing was calibrated on. " * 300)
    said = _run(tmp_path, f"DATA_PATH={other}")
    assert "calibration: reuse" in said
    assert _weights(tmp_path) == _weights(finished[0])


def test_one_damaged_block_is_made_again_and_no_other(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "job", symlinks=True)
    folder = tmp_path / "job"
    calibrated = _job(folder) / "tmp" / "calibration"
    content = bytearray((calibrated / "1.safetensors").read_bytes())
    content[-3] ^= 4
    (calibrated / "1.safetensors").write_bytes(bytes(content))
    kept = {index: (calibrated / f"{index}.safetensors").stat().st_mtime_ns for index in (0, 2, 3)}
    assert "1.safetensors" in _run(folder, "llm.AQLM.overwrite=[conversion]")
    assert {index: (calibrated / f"{index}.safetensors").stat().st_mtime_ns for index in kept} == kept
    assert _weights(folder) == _weights(finished[0])
