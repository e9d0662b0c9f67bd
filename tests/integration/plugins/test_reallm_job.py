"""ReALLM's example through main.py, made small: every stage, every format, on two processes and then on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SMALL = {
    "rank": 2, "iterations": 1, "nsamples": 8, "model_seqlen": 32, "block_tuning": "{max_epochs: 1}",
    "global_tuning": "{max_epochs: 1, nsamples: 8, model_seqlen: 32}", "save_intermediate_results": "true",
}  # fmt: skip
STAGES = ("calibration", "finetune_bloc", "finetune_global")


def _run(folder, *overrides):
    command = [sys.executable, "main.py", "--yaml_path", "examples/text-generation/reallm_quantization/config.yaml"]
    command += [f"USER_FOLDER={folder}", "EVALUATION.max_tokens=512", "EVALUATION.sequence_length=32"]
    command += [f"llm.ReALLM.{key}={value}" for key, value in SMALL.items()]
    done = subprocess.run(
        [*command, *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_on_two_processes_every_stage_is_measured_and_every_format_certified(tmp_path):
    said = _run(tmp_path, "NUM_PROCESSES=2")
    job = tmp_path / "jobs" / "Kompress" / "reallm_quantization"
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line.get("event") == "evaluation" and "perplexity" in line]
    measured = {line["stage"]: line["perplexity"] for line in found}
    for stage in STAGES:
        assert set(measured[stage]) == {"wikitext2_excerpt", "gsm8k_excerpt"}
        assert (job / "tmp" / stage / "calibration.json").is_file()
    for name in ("dense", "reallm", "peft"):
        assert f"Certificate of {name}: passed" in said or f"Certificate of {name}: no client" in said
    assert (job / "exports" / "peft" / "base" / "config.json").is_file()
    again = _run(tmp_path)
    assert "Stage calibration: starts" not in again
    assert "Stage finetune_global: starts" not in again
