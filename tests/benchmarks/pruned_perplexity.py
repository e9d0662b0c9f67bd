"""Perplexity, parameters left and cost of FLAP, for the settings of the plugin's README.

    python -m tests.benchmarks.pruned_perplexity --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting "structure=UL-MM pruning_ratio=0.5" ...] [--skip 0] [KEY=VALUE ...]

A setting is keys of ``llm.FlapPruner``. Each is one job through main.py on one thread, exported padded; the user CPU seconds of
its stages come from the manifest, the share of the linears' weights that is left from its bits report. Texts are scored as in
tests/benchmarks/aqlm_perplexity. Without --setting, those of SETTINGS are run. Further KEY=VALUE pairs count for all.
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
from transformers import AutoModelForCausalLM

from tests.benchmarks.aqlm_perplexity import ROOT, read_text, score

STRUCTURES = ("AL-AM", "UL-MM")
RATIOS = (0.2, 0.5)
METRICS = ("metrics=OBS", "metrics=WIFV", "metrics=WIFV compensation=bias")
SETTINGS = tuple(
    f"structure={structure} pruning_ratio={ratio} {how}" for structure in STRUCTURES for ratio in RATIOS for how in METRICS
)
STAGES = ("ranking", "pruning")
RECIPE = """
ALGORITHM: FlapPruner
JOB_SERVICE: Kompress
JOB_ID: benchmark
TEXT_COLUMN: text
EXPORT: [padded]
llm: {FlapPruner: {save_intermediate_results: true, nsamples: 128, model_seqlen: 256, to_finetune: false}}
"""


def run(setting: str, arguments: argparse.Namespace, folder: Path) -> tuple[Path, list[float], float]:
    """Run the job; returns the folder of the model, the user CPU seconds of its stages, and the share of weights left."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "main.py", "--yaml_path", str(recipe), f"USER_FOLDER={folder}"]
    command += [f"MODEL={arguments.model.resolve()}", f"DATA_PATH={arguments.tokens.resolve()}"]
    command += [f"llm.FlapPruner.{key}" for key in (*setting.split(), *arguments.overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    job = folder / "jobs" / "Kompress" / "benchmark"
    stages = json.loads((job / "manifest.json").read_text(encoding="utf-8"))["stages"]
    bits = json.loads((job / "bits_report.json").read_text(encoding="utf-8"))
    return job, [stages[name]["user_cpu_s"] for name in STAGES], bits["weights"] / 16 / bits["parameters"]


def main() -> None:
    """Run the benchmark and print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--setting", action="append")
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    texts = {name: read_text(Path(file)) for name, _, file in (entry.partition("=") for entry in arguments.text)}
    for setting in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job, seconds, left = run(setting, arguments, Path(folder))
            figures = score(AutoModelForCausalLM.from_pretrained(job, dtype=torch.float32), job, texts, arguments.skip)
        mean = math.exp(sum(math.log(value) for value in figures.values()) / len(figures))
        each = " / ".join(f"{value:.2f}" for value in figures.values())
        cost = " + ".join(f"{value:.1f}" for value in seconds)
        sys.stdout.write(f"{setting}\n    {each}   geometric mean {mean:.3f}   {left:.2%} left   {cost} CPU s\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
