"""The examples of GPTQ, AWQ, RTN and SpQR through main.py with the real plugins, data and clients, made small."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = {
    "GPTQ": ("gptq_quantization", ("compressed-tensors", "gguf", "dense"), {}),
    "AutoAWQ": ("awq_quantization", ("awq", "dense"), {}),
    "RTN": ("rtn_quantization", ("compressed-tensors",), {}),
    "SpQR": ("spqr_quantization", ("dense", "spqr"), {"block_tuning": "{max_epochs: 1}"}),
}
SMALL = {"nsamples": 12, "model_seqlen": 64, "save_intermediate_results": "true"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def _command(algorithm, folder, *overrides):
    name, _, changes = EXAMPLES[algorithm]
    command = [sys.executable, "main.py", "--yaml_path", f"examples/text-generation/{name}/config.yaml"]
    command += [f"USER_FOLDER={folder}", "EVALUATION.max_tokens=1024", "EVALUATION.sequence_length=64"]
    return [*command, *(f"llm.{algorithm}.{key}={value}" for key, value in {**SMALL, **changes}.items()), *overrides]


def _run(algorithm, folder, *overrides, check=0, command=None):
    program, main, *arguments = _command(algorithm, folder, *overrides)
    done = subprocess.run(
        [program, main, *([command] if command else []), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def _job(algorithm, folder):
    return folder / "jobs" / "Kompress" / EXAMPLES[algorithm][0]


def _weights(algorithm, folder):
    """Digests of every file of weights by its place in the job: calibrated, converted and exported."""
    job = _job(algorithm, folder)
    found = [
        path for path in job.rglob("*") if path.suffix in (".safetensors", ".gguf") and "tokenized_dataset" not in path.parts
    ]
    return {str(path.relative_to(job)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Runs the example of an algorithm when first asked for it: its folder and what the job said."""
    done = {}

    def job(algorithm):
        if algorithm not in done:
            folder = tmp_path_factory.mktemp(algorithm)
            done[algorithm] = folder, _run(algorithm, folder)
        return done[algorithm]

    return job


@pytest.mark.parametrize("algorithm", EXAMPLES)
def test_every_format_is_certified(jobs, algorithm):
    folder, said = jobs(algorithm)
    job, formats = _job(algorithm, folder), EXAMPLES[algorithm][1]
    certificate = json.loads((job / "certificate.json").read_text())
    verdicts = {entry["format"]: entry["verdict"] for entry in certificate["formats"]}
    assert verdicts == {name: "no client on this machine" if name == "awq" else "passed" for name in formats}
    for place, name in enumerate(formats):
        exported = job if place == 0 else job / "exports" / name
        assert name == "gguf" or (exported / "config.json").is_file()
        assert (exported / "tokenizer.json").is_file()
        assert (exported / ("model.gguf" if name == "gguf" else "model.safetensors")).is_file()
    stages = json.loads((job / "manifest.json").read_text())["stages"]
    assert [stages[name]["status"] for name in ("calibration", "conversion")] == ["finished", "finished"]
    assert "bits per compressed weight" in said


@pytest.mark.parametrize("algorithm", EXAMPLES)
def test_a_second_run_reuses_everything(jobs, algorithm):
    folder, _ = jobs(algorithm)
    before = _weights(algorithm, folder)
    said = _run(algorithm, folder)
    assert "calibration: reuse" in said
    assert "conversion: reuse" in said
    assert _weights(algorithm, folder) == before
    assert len(before) >= 6


@pytest.mark.parametrize("algorithm", ["GPTQ", "SpQR"])
def test_killed_in_the_middle_it_resumes_and_ends_with_the_same_files(jobs, tmp_path, algorithm):
    command = _command(algorithm, tmp_path, "STAGES=[calibration]")
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = _job(algorithm, tmp_path) / "tmp" / ".calibration.partial"
    deadline = time.monotonic() + 120
    while not (partial / "0.json").is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (partial / "3.json").exists()
    kept = (partial / "0.safetensors").stat().st_mtime_ns
    _run(algorithm, tmp_path, "STAGES=[calibration]")
    assert (_job(algorithm, tmp_path) / "tmp" / "calibration" / "0.safetensors").stat().st_mtime_ns == kept
    whole = _weights(algorithm, jobs(algorithm)[0])
    calibrated = {name: digest for name, digest in whole.items() if name.startswith("tmp/calibration/")}
    assert len(calibrated) == 5
    assert _weights(algorithm, tmp_path) == calibrated


@pytest.mark.parametrize(("algorithm", "format_"), [("SpQR", "spqr"), ("GPTQ", "gguf")])
def test_a_further_format_is_scored_like_the_first(jobs, algorithm, format_):
    folder, said = jobs(algorithm)
    scored = _run(algorithm, folder, "--directory", str(_job(algorithm, folder) / "exports" / format_), command="evaluate")
    figures = [set(re.findall(r"perplexity (\d+\.\d+ -> \d+\.\d+)", text)) for text in (said, scored)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 2


def test_what_awq_has_scaled_is_among_the_figures(jobs):
    folder, _ = jobs("AutoAWQ")
    job = _job("AutoAWQ", folder)
    lines = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    told = [line["scaling"] for line in lines if line.get("event") == "block"]
    kept = json.loads((job / "tmp" / "calibration" / "calibration.json").read_text())["blocks"]
    assert told == [block["scaling"] for block in kept]
    assert len(told) == 4
    assert all(0 < figures["error_share"] <= 1 for scaling in told for figures in scaling.values())


def test_rounding_to_nearest_looks_for_no_text(jobs):
    folder, _ = jobs("RTN")
    assert not list(_job("RTN", folder).glob("tmp/tokenized_dataset/*/record.json"))


def test_sixteen_bits_give_figures_and_no_weights(tmp_path):
    said = _run("SpQR", tmp_path, "llm.SpQR.wbits=16", "llm.SpQR.target_bits=null")
    assert "wikitext2_excerpt" in said
    assert not list(_job("SpQR", tmp_path).rglob("*.safetensors"))
