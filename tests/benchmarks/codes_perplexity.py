"""Perplexity, bits and cost of RTN, GPTQ, AWQ and SpQR, for the settings of the plugins' READMEs.

    python -m tests.benchmarks.codes_perplexity --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting "GPTQ wbits=3 groupsize=128 sym=false" ...] [--seed 0] [--skip 0] [KEY=VALUE ...]

A setting is an algorithm and keys of its block. Each is one job through main.py on one thread, exported as dense weights; the
calibration's own user CPU seconds come from the manifest, the bits from its bits report. Texts are scored as in
tests/benchmarks/aqlm_perplexity. Without --setting, those of SETTINGS are run. Further KEY=VALUE pairs override the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.aqlm_perplexity import ROOT, read_text, score

UNIFORM = ("{} wbits=4 groupsize=128 sym=false", "{} wbits=3 groupsize=128 sym=false", "{} wbits=2 groupsize=64 sym=false")
SETTINGS = (
    *(line.format("GPTQ") for line in UNIFORM),
    *(line.format("RTN") for line in UNIFORM),
    *(f"{line.format('GPTQ')} block_tuning={{}}" for line in UNIFORM),
    "AutoAWQ W_BIT=4",
    "AutoAWQ W_BIT=3",
    "AutoAWQ W_BIT=3 gptq=false",
    "SpQR wbits=4",
    "SpQR wbits=3",
    "SpQR wbits=2 target_bits=4.5",
)
RECIPE = """
ALGORITHM: {algorithm}
JOB_SERVICE: Kompress
JOB_ID: benchmark
TEXT_COLUMN: text
EXPORT: [dense]
llm: {{{algorithm}: {{save_intermediate_results: true, nsamples: 128, model_seqlen: 256}}}}
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A finished job: its folder, the user CPU seconds of its stages, and its bits report."""

    folder: Path
    seconds: Mapping[str, float]
    bits: Mapping[str, float]


def arguments_of(description: str) -> argparse.Namespace:
    """What the benchmarks that score one job a setting are told; ``texts`` are read already."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--setting", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    pairs = (entry.partition("=") for entry in arguments.text)
    arguments.texts = {name: read_text(Path(file)) for name, _, file in pairs}
    return arguments


def run_job(recipe: str, algorithm: str, keys: Sequence[str], arguments: argparse.Namespace, folder: Path) -> Job:
    """Run a recipe (YAML) with keys of its algorithm's block, through main.py on one thread."""
    file = folder / "recipe.yaml"
    file.write_text(recipe, encoding="utf-8")
    command = [sys.executable, "main.py", "--yaml_path", str(file), f"USER_FOLDER={folder}"]
    command += [f"MODEL={arguments.model.resolve()}", f"DATA_PATH={arguments.tokens.resolve()}"]
    command += [f"llm.{algorithm}.{key}" for key in (f"seed={arguments.seed}", *keys, *arguments.overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    job = folder / "jobs" / "Kompress" / "benchmark"
    manifest = json.loads((job / "manifest.json").read_text(encoding="utf-8"))
    return Job(
        folder=job,
        seconds={name: stage["user_cpu_s"] for name, stage in manifest["stages"].items()},
        bits=json.loads((job / "bits_report.json").read_text(encoding="utf-8")),
    )


def run(setting: str, arguments: argparse.Namespace, folder: Path) -> tuple[Path, float, dict[str, float]]:
    """Run the job; returns the folder of the dense model, the calibration's user CPU seconds, and its bits a weight."""
    algorithm, *keys = setting.split()
    job = run_job(RECIPE.format(algorithm=algorithm), algorithm, keys, arguments, folder)
    bits = {name: value / job.bits["parameters"] for name, value in job.bits.items() if name not in ("parameters", "added")}
    return job.folder, job.seconds["calibration"], bits


def told(setting: str, figures: Mapping[str, float], rest: str) -> None:
    """Print the perplexities of a setting and their geometric mean, and the rest."""
    mean = math.exp(sum(math.log(value) for value in figures.values()) / len(figures))
    each = " / ".join(f"{value:.2f}" for value in figures.values())
    sys.stdout.write(f"{setting}\n    {each}   geometric mean {mean:.3f}   {rest}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the benchmark and print three lines a setting."""
    arguments = arguments_of(__doc__)
    for setting in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job, seconds, bits = run(setting, arguments, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(job, dtype=torch.float32)
            figures = score(model, job, arguments.texts, arguments.skip)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
        told(setting, figures, f"{seconds:.1f} CPU s\n    {sum(bits.values()):.3f} bits: {parts}")


if __name__ == "__main__":
    main()
