"""A plan with a probe, through main.py with the real plugins and processes: it keeps its word, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import ExitCode
from tests.support.models import save_family
from tests.support.source_tree import ROOT

FACTOR = 2.0  # on a busy machine; tests/benchmarks/planning has the true figures
LONG_ENOUGH = 0.5  # seconds of CPU below which a stage says nothing
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps", "again"]
RECIPE = """
ALGORITHM: FlapPruner
JOB_ID: probed
USER_FOLDER: {folder}/user_data
MODEL: {folder}/model
DATA_PATH: {folder}/text.jsonl
CORPORA: {{mine: {folder}/test.txt}}
EVALUATION: {{perplexity: [mine], sequence_length: 128}}
llm:
  FlapPruner:
    nsamples: 96
    model_seqlen: 128
    to_finetune: true
    recovery: {{model_seqlen: 128, max_epochs: 1, nsamples: 80, batch_size: 4}}
"""


def _text(number):
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(40))


def _command(folder, *words):
    return [sys.executable, "main.py", *words, "--yaml_path", str(folder / "recipe.yaml")]


def _environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _run(folder, *words):
    done = subprocess.run(
        _command(folder, *words), cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of 5 blocks, text, and a recipe with a walk, a refit and a tuning of 20 steps."""
    found = tmp_path_factory.mktemp("probe")
    save_family(found / "model", "llama", blocks=5, hidden=128)
    (found / "text.jsonl").write_text("".join(json.dumps({"text": _text(number)}) + "\n" for number in range(120)))
    (found / "test.txt").write_text("\n".join(_text(number) for number in range(60)))
    (found / "recipe.yaml").write_text(RECIPE.format(folder=found))
    return found


@pytest.fixture(scope="module")
def planned(folder):
    """What the plan said, before the job had run, and what stood in the user folder then."""
    said = _run(folder, "plan", "--probe")
    return said, sorted(path.name for path in (folder / "user_data").iterdir())


def test_the_plan_creates_its_figures_and_nothing_else(folder, planned):
    said, created = planned
    assert created == [".cache"]
    assert not list((folder / "user_data" / ".cache").glob("probe-*"))
    lines = [line.split()[0] for line in said.splitlines() if line.endswith("a probe")]
    assert lines == ["ranking", "pruning", "recovery", "conversion", "certificate", "evaluation", "total"]


def test_what_was_predicted_is_what_it_costs(folder, planned):
    said = _run(folder)
    assert "predicted from" in said
    manifest = json.loads((folder / "user_data/jobs/Kompress/probed/manifest.json").read_text())
    lines = {name: (record["predicted"], record) for name, record in manifest["stages"].items()}
    for name in ("certificate", "evaluation"):
        lines[name] = manifest[name]["predicted"], manifest[name]["cost"]
    assert {predicted["basis"] for predicted, _ in lines.values()} == {"a probe"}
    for name, (predicted, actual) in lines.items():
        assert 1 / FACTOR < predicted["peak_memory_bytes"] / actual["peak_memory_bytes"] < FACTOR, name
        if actual["user_cpu_s"] > LONG_ENOUGH:
            assert 1 / FACTOR < predicted["user_cpu_s"] / actual["user_cpu_s"] < FACTOR, name
    totals = [sum(line[place]["user_cpu_s"] for line in lines.values()) for place in (0, 1)]
    assert 1 / FACTOR < totals[0] / totals[1] < FACTOR
    for name, record in manifest["stages"].items():
        written = sum(entry["size"] for entry in record["files"].values())
        assert record["predicted"]["disk_bytes"] == pytest.approx(written, rel=0.1), name


def test_a_probe_that_is_stopped_takes_its_process_and_its_folder_along(folder):
    cache = folder / "elsewhere"
    command = [*_command(folder, "plan", "--probe"), f"CACHE_PATH={cache}", "JOB_ID=stopped"]
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not _processes_of(cache):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.INTERRUPTED
    assert not _processes_of(cache)
    assert not list(cache.glob("probe-*"))


def _processes_of(cache):
    """Running probes that work below a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "jobs.estimation.probe_process" in words and any(word.startswith(f"{cache}/probe-") for word in words):
            found.append(entry.name)
    return found
