"""Pruning, then quantizing what is left, through main.py with the real plugins, data and clients, made small."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import ExitCode
from main import main
from tests.support.source_tree import ROOT

RECIPES = "examples/text-generation/pruned_then_quantized"
TEXTS = ("EVALUATION.max_tokens=1024", "EVALUATION.sequence_length=64")
SMALL = {"nsamples": 12, "model_seqlen": 64, "save_intermediate_results": "true"}


def _arguments(folder, recipe, algorithm, *overrides):
    keys = [f"llm.{algorithm}.{key}={value}" for key, value in SMALL.items()]
    return ["--yaml_path", f"{RECIPES}/{recipe}.yaml", f"USER_FOLDER={folder}", *TEXTS, *keys, *overrides]


def _prune(folder, *overrides):
    return _arguments(folder, "prune", "FlapPruner", "EXPORT=[padded,ragged]", *overrides)


def _job(folder, name):
    return folder / "jobs" / "Kompress" / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user folder in which both jobs have run."""
    found = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(_prune(found)) is ExitCode.DONE
        assert main(_arguments(found, "quantize", "GPTQ")) is ExitCode.DONE
    return found


def test_both_formats_are_certified_and_the_bits_are_those_of_what_is_left(folder):
    job = _job(folder, "pruned")
    assert [entry["verdict"] for entry in json.loads((job / "certificate.json").read_text())["formats"]] == ["passed"] * 2
    bits = json.loads((job / "bits_report.json").read_text())
    assert bits["weights"] / 16 == pytest.approx(0.8 * bits["parameters"], rel=0.005)
    config = json.loads((job / "config.json").read_text())
    assert config["intermediate_size"] % 32 == 0
    ragged = json.loads((job / "exports" / "ragged" / "config.json").read_text())
    assert max(ragged["intermediate_size_per_layer"]) <= config["intermediate_size"]
    assert "sizes" in json.loads((job / "prune_config.json").read_text())


def test_the_second_job_quantizes_the_narrow_model(folder):
    pruned, quantized = (
        json.loads((_job(folder, name) / "config.json").read_text()) for name in ("pruned", "pruned_then_quantized")
    )
    assert quantized["intermediate_size"] == pruned["intermediate_size"]
    assert quantized["quantization_config"]["quant_method"] == "compressed-tensors"


def test_a_ranking_cannot_be_evaluated_and_what_was_pruned_can(folder, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    tmp = _job(folder, "pruned") / "tmp"
    assert main(["evaluate", *_prune(folder), "--directory", str(tmp / "ranking")]) is ExitCode.RECIPE
    said = " ".join(capfd.readouterr().err.split())
    assert "says what is to be pruned and holds no model; name the result of a later stage" in said
    assert "Traceback" not in said
    assert main(["evaluate", *_prune(folder), "--directory", str(tmp / "pruning")]) is ExitCode.DONE


def test_a_killed_job_ends_with_the_same_weights(folder, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "main.py", *_prune(tmp_path, "EVALUATION=null")]
    started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = _job(tmp_path, "pruned") / "tmp" / ".pruning.partial" / "0.json"
    deadline = time.monotonic() + 120
    while not first.is_file() and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode == 0
    expected, found = (load_file(_job(at, "pruned") / "model.safetensors") for at in (folder, tmp_path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
