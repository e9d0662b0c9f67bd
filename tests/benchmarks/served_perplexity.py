"""Perplexity of LMQuant's presets as they are served, with rounded inputs and a rounded cache, for the settings of its README.

    python -m tests.benchmarks.served_perplexity --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting "LMQuant quant_type=g128 quant.opts.dtype=null" ...] [--seed 0] [--skip 0] [KEY=VALUE ...]

Options and jobs are those of tests/benchmarks/codes_perplexity, on one thread; what is scored is the calibration itself, by the
plugin's own reader, computing as the job's evaluation does. Without --setting, those of SETTINGS are run.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from torch import nn

from algorithms.base import Artifact
from algorithms.modeling.source import ModelSource
from algorithms.registry import algorithm_class, config_class
from configs.loader import load_recipe
from tests.benchmarks.aqlm_perplexity import score
from tests.benchmarks.codes_perplexity import arguments_of, run, told

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
    """Run the benchmark and print two lines a setting."""
    arguments = arguments_of(__doc__)
    for setting in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job, seconds, bits = run(setting, arguments, Path(folder))
            figures = score(served(job, arguments.model), arguments.model, arguments.texts, arguments.skip)
        told(setting, figures, f"{seconds:.1f} CPU s   {sum(bits.values()):.3f} bits")


if __name__ == "__main__":
    main()
