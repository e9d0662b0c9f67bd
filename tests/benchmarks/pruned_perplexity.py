"""Perplexity, parameters left and cost of FLAP, for the settings of the plugin's README.

    python -m tests.benchmarks.pruned_perplexity --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting "structure=UL-MM pruning_ratio=0.5" ...] [--skip 0] [KEY=VALUE ...]

A setting is keys of ``llm.FlapPruner``. Each is one job through main.py on one thread, exported padded; the user CPU seconds of
its stages come from the manifest, the share of the linears' weights that is left from its bits report. Texts are scored as in
tests/benchmarks/aqlm_perplexity. Without --setting, those of SETTINGS are run. Further KEY=VALUE pairs count for all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.aqlm_perplexity import score
from tests.benchmarks.codes_perplexity import arguments_of, run_job, told

STRUCTURES = ("AL-AM", "UL-MM")
RATIOS = (0.2, 0.5)
METRICS = ("metrics=OBS", "metrics=WIFV", "metrics=WIFV compensation=bias")
SETTINGS = tuple(
    f"structure={structure} pruning_ratio={ratio} {how}" for structure in STRUCTURES for ratio in RATIOS for how in METRICS
)
STAGES = ("ranking", "pruning", "recovery")
RECIPE = """
ALGORITHM: FlapPruner
JOB_SERVICE: Kompress
JOB_ID: benchmark
TEXT_COLUMN: text
EXPORT: [padded]
llm: {FlapPruner: {save_intermediate_results: true, nsamples: 128, model_seqlen: 256, to_finetune: false}}
"""


def main() -> None:
    """Run the benchmark and print two lines a setting."""
    arguments = arguments_of(__doc__)
    for setting in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job = run_job(RECIPE, "FlapPruner", setting.split(), arguments, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32)
            figures = score(model, job.folder, arguments.texts, arguments.skip)
        left = job.bits["weights"] / 16 / job.bits["parameters"]
        cost = " + ".join(f"{job.seconds[name]:.1f}" for name in STAGES if name in job.seconds)
        told(setting, figures, f"{left:.2%} left   {cost} CPU s")


if __name__ == "__main__":
    main()
