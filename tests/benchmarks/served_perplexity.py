"""Perplexity of LMQuant's presets as they are served, with rounded inputs and a rounded cache, for the settings of its README.

    python -m tests.benchmarks.served_perplexity --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting "LMQuant quant_type=g128 quant.opts.dtype=null" ...] [--seed 0] [--skip 0] [KEY=VALUE ...]

Options and jobs are those of tests/benchmarks/codes_perplexity, on one thread; what is scored is the calibration itself, by the
plugin's own reader, computing as the job's evaluation does. Without --setting, those of SETTINGS are run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

from torch import nn

from algorithms.base import Artifact
from algorithms.modeling.source import ModelSource
from algorithms.registry import algorithm_class, config_class
from configs.loader import load_recipe
from tests.benchmarks.aqlm_perplexity import read_text, score
from tests.benchmarks.codes_perplexity import run

KV4 = "LMQuant quant_type=g128 quant.wgts.dtype=null quant.ipts.dtype=null quant.enable_reorder=false"
PRESETS = ("g128", "gchn", "w4a8kv4_sym", "gchn_kv8", "sq_dynamic", "sq_static", "awq", "gptq")
SETTINGS = (
    *(f"LMQuant quant_type={name}" for name in PRESETS),
    "LMQuant quant_type=w4a8kv4_sym quant.opts.dtype=null",
    KV4,
)


def served(job: Path, model: Path) -> nn.Module:
    """What a job's calibration stands for, computing as it is served."""
    loaded = load_recipe(job / "recipe.yaml", plugin_config=config_class)
    plugin = algorithm_class(loaded.recipe.algorithm)(loaded.parameters, ("dense",))
    record = json.loads((job / "manifest.json").read_text(encoding="utf-8"))["stages"]["calibration"]
    artifact = Artifact(kind=record["kind"], directory=job / "tmp" / record["directory"], digest=record["key"])
    return plugin.as_served(plugin.load(artifact), artifact, ModelSource(model))


def main() -> None:
    """Run the benchmark and print three lines a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--setting", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    texts = {name: read_text(Path(file)) for name, _, file in (entry.partition("=") for entry in arguments.text)}
    for setting in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job, seconds, bits = run(setting, arguments, Path(folder))
            figures = score(served(job, arguments.model), arguments.model, texts, arguments.skip)
        mean = math.exp(sum(math.log(value) for value in figures.values()) / len(figures))
        each = " / ".join(f"{value:.2f}" for value in figures.values())
        total = sum(bits.values())
        sys.stdout.write(f"{setting}\n    {each}   geometric mean {mean:.3f}   {seconds:.1f} CPU s   {total:.3f} bits\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
