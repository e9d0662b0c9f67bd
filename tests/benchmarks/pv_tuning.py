"""What PV-Tuning gains over the calibration that it starts from, and what a step of it costs.

    python -m tests.benchmarks.pv_tuning --model DIR --calibration FILE.pt --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--codebooks 2] [--setting "KEY=VALUE ..." ...] [--seed 0] [--ranks 1]

Calibrates once (128 sequences, block tuning), then tunes that calibration once a setting, whose KEY=VALUE pairs are those of
``finetune_config``, and prints perplexities as tests/benchmarks/aqlm_perplexity.py measures them, the share of the gap to the
uncompressed model that was closed (geometric means), and over all steps the groups that were examined, proposed and changed.
One thread a process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from algorithms.formats.aqlm import packed_linears, unpack
from algorithms.formats.checkpoint import Calibrated
from tests.benchmarks.aqlm_perplexity import RECIPE, ROOT, read_text, score

SERVICE = Path("jobs") / "Kompress"
LOOP = {
    "model_seqlen": 256,
    "max_epochs": 3,
    "microbatch_size": "null",
    "gradient_checkpointing": "false",
    "eval_datasets": "[]",
}
LOOP_OF_README = "batch_size=4 lr=2e-3 adam_beta2=0.99 lr_schedule=cosine code_trust_ratio=null"
DEFAULT = (f"{LOOP_OF_README} update_codes=false", f"{LOOP_OF_README} code_lr=0.02")


def run(arguments: argparse.Namespace, folder: Path, job: str, text: Path, overrides: Sequence[str]) -> Path:
    """Run the job to its end; returns its folder."""
    settings = {"num_codebooks": arguments.codebooks, "nbits_per_codebook": 8, "seed": arguments.seed}
    command = [sys.executable, "main.py", "--yaml_path", str(RECIPE), f"USER_FOLDER={folder}", f"JOB_ID={job}"]
    command += [f"MODEL={arguments.model.resolve()}", f"DATA_PATH={text.resolve()}"]
    command += [f"llm.AQLM.calibration_config.{key}={value}" for key, value in settings.items()]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    output = folder / f"{job}.txt"
    with output.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [*command, *overrides], cwd=ROOT, env={**os.environ, **threads}, stdout=stream, stderr=stream, check=False
        )
    if done.returncode:
        sys.exit(output.read_text(encoding="utf-8"))
    return folder / SERVICE / job


def tune(arguments: argparse.Namespace, folder: Path, start: Path, job: str, setting: str) -> Path:
    """A copy of the calibrated job, tuned."""
    shutil.copytree(start, folder / SERVICE / job)
    pairs = {**LOOP, "seed": arguments.seed, **dict(pair.split("=", 1) for pair in setting.split())}
    overrides = ["llm.AQLM.finetune_config={}", *(f"llm.AQLM.finetune_config.{key}={value}" for key, value in pairs.items())]
    if arguments.ranks > 1:
        overrides.append(f"NUM_PROCESSES={arguments.ranks}")
    return run(arguments, folder, job, arguments.tokens, overrides)


def cost(job: Path) -> str:
    """CPU seconds a step, and what became of the codes, from the job's metrics."""
    steps = [json.loads(line) for line in (job / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in steps if line.get("event") == "step"]
    counts = [sum(line.get(f"codes_{name}", 0) for line in steps) for name in ("examined", "proposed", "changed")]
    seconds = sum(line["cpu_seconds"] for line in steps) / len(steps)
    stage = json.loads((job / "manifest.json").read_text(encoding="utf-8"))["stages"]["finetune"]
    return (
        f"{len(steps)} steps of {seconds:.2f} CPU s, {stage['user_cpu_s']:.1f} in all, wall {stage['wall_s']:.1f} s; "
        f"groups examined {counts[0]}, proposed {counts[1]}, changed {counts[2]}"
    )


def spacing(calibration: Path) -> str:
    """How far a group has to move before another codeword is nearer, in shares of a typical group's norm."""
    distances = []
    for _, tensors in Calibrated(calibration).blocks():
        for name in packed_linears(list(tensors)):
            weight = unpack(tensors, name)
            groups = weight.unscaled() * weight.scales[:, None, None]
            nearest = torch.full(weight.codes.shape[:2], math.inf)
            for codewords, codes in zip(weight.codebooks.flatten(2), weight.codes.unbind(2), strict=True):
                between = torch.cdist(codewords, codewords).fill_diagonal_(math.inf).amin(1)
                nearest = torch.minimum(nearest, between[codes])
            half_way = nearest * weight.scales[:, None] / 2
            distances.append((half_way / groups.square().sum(2).mean().sqrt()).flatten())
    shares = torch.cat(distances).quantile(torch.tensor([0.01, 0.5])).tolist()
    return f"half the way to another codeword: {shares[1]:.0%} of a group's norm (median), {shares[0]:.0%} (first percentile)"


def mean(figures: Mapping[str, float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(value) for value in figures.values()) / len(figures))


def main() -> None:
    """Run the benchmark and print one line a setting."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--codebooks", type=int, default=2)
    parser.add_argument("--setting", action="append", metavar="KEY=VALUE ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    texts = {name: read_text(Path(file)) for name, _, file in (entry.partition("=") for entry in arguments.text)}

    def _figures(folder: Path) -> dict[str, float]:
        return score(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), arguments.model, texts, 0)

    goal = _figures(arguments.model)
    report("uncompressed", goal, "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = run(arguments, folder, "start", arguments.calibration, [])
        before = _figures(start)
        report(f"{arguments.codebooks}x8, calibrated", before, spacing(start / "tmp" / "calibration"))
        for place, setting in enumerate(arguments.setting or DEFAULT):
            job = tune(arguments, folder, start, f"tuned{place}", setting)
            after = _figures(job)
            closed = (mean(before) - mean(after)) / (mean(before) - mean(goal))
            report(setting, after, f"{closed:.1%} of the gap closed; {cost(job)}")


def report(name: str, figures: Mapping[str, float], more: str) -> None:
    """Print one line."""
    each = " / ".join(f"{value:.2f}" for value in figures.values())
    sys.stdout.write(f"{name}: {each}   geometric mean {mean(figures):.3f}   {more}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
