"""Perplexity after AQLM calibration, and what the calibration cost, for the three settings of the plugin's README.

    python -m tests.benchmarks.aqlm_perplexity --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting 2x8 --setting 2x8+tuning --setting 1x8+tuning] [--seed 0] [KEY=VALUE ...]

Runs one job a setting through main.py on one thread, reads the calibration's own user CPU seconds from the manifest, and scores
the result on the first 65,536 tokens of each text: windows of 256 tokens, no BOS, a window's first token unscored. A .jsonl
text is a list of {question, answer}, joined as "Question: ...\nAnswer: ...". Further KEY=VALUE pairs override the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from algorithms.modeling.evaluation.perplexity import perplexity

RECIPE = Path(__file__).with_suffix(".yaml")
ROOT = RECIPE.parents[2]
MAX_TOKENS = 65536
SETTINGS = {
    "2x8": {"num_codebooks": 2, "nbits_per_codebook": 8, "finetune_max_epochs": 0},
    "2x8+tuning": {"num_codebooks": 2, "nbits_per_codebook": 8},
    "1x8+tuning": {"num_codebooks": 1, "nbits_per_codebook": 8},
}


def read_text(path: Path) -> str:
    """A text file as it stands, or the problems of a .jsonl file."""
    if path.suffix != ".jsonl":
        return path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)


def calibrate(setting: dict[str, int], arguments: argparse.Namespace, folder: Path) -> tuple[Path, float]:
    """Run the job; returns the folder of the dense model and the calibration's user CPU seconds."""
    changes = {**setting, "seed": arguments.seed}
    command = [sys.executable, "main.py", "--yaml_path", str(RECIPE), f"USER_FOLDER={folder}"]
    command += [f"MODEL={arguments.model.resolve()}", f"DATA_PATH={arguments.tokens.resolve()}"]
    command += [f"llm.AQLM.calibration_config.{key}={value}" for key, value in changes.items()]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (folder / "output.txt").open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [*command, *arguments.overrides], cwd=ROOT, env={**os.environ, **threads}, stdout=stream, stderr=stream, check=False
        )
    if done.returncode:
        sys.exit((folder / "output.txt").read_text(encoding="utf-8"))
    job = folder / "jobs" / "Kompress" / "benchmark"
    manifest = json.loads((job / "manifest.json").read_text(encoding="utf-8"))
    return job, manifest["stages"]["calibration"]["user_cpu_s"]


def score(model: nn.Module, folder: Path, texts: dict[str, str], skip: int) -> dict[str, float]:
    """Perplexity of each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures = {}
    for name, text in texts.items():
        ids = tokenizer(text[: (skip + MAX_TOKENS) * 8], add_special_tokens=False)["input_ids"][skip : skip + MAX_TOKENS]
        figures[name] = perplexity(model, torch.tensor(ids), 256).value
    return figures


def main() -> None:
    """Run the benchmark and print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--setting", action="append", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    texts = {name: read_text(Path(file)) for name, _, file in (entry.partition("=") for entry in arguments.text)}
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    report("uncompressed", score(base, arguments.model, texts, arguments.skip), 0.0)
    for name in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job, seconds = calibrate(SETTINGS[name], arguments, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(job, dtype=torch.float32)
            report(name, score(model, job, texts, arguments.skip), seconds)


def report(name: str, figures: dict[str, float], seconds: float) -> None:
    """Print one line."""
    mean = math.exp(sum(math.log(value) for value in figures.values()) / len(figures))
    each = " / ".join(f"{value:.2f}" for value in figures.values())
    sys.stdout.write(f"{name:14} {each}   geometric mean {mean:.3f}   calibration {seconds:.1f} CPU s\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
