"""Perplexity, bits and cost of ReALLM after each of its stages, for the settings of the plugin's README.

    python -m tests.benchmarks.reallm.stages --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--setting "rank=8 block_tuning=null" ...] [--seed 0] [--skip 0] [KEY=VALUE ...]

A setting is keys of ``llm.ReALLM``. Each is one job through main.py on one thread; user CPU seconds of its stages come from
the manifest, bits from its bits report. Texts are scored as in tests/benchmarks/aqlm_perplexity. Without --setting, those of
SETTINGS are run. Further KEY=VALUE pairs count for all.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from algorithms.base import Artifact
from algorithms.quantization.reallm.algorithm import Reallm
from algorithms.quantization.reallm.config import BLOC, CALIBRATION, GLOBAL, ReallmConfig
from tests.benchmarks.aqlm_perplexity import score
from tests.benchmarks.codes_perplexity import arguments_of, run_job, told

_WHOLE = "global_tuning.nsamples=128 global_tuning.model_seqlen=256"
_BARE = "block_tuning=null"
SETTINGS = (
    f"rank=8 {_WHOLE}",
    f"rank=16 {_WHOLE}",
    f"target_bits=4.11 {_WHOLE}",
    f"rank=8 residual=nf {_BARE}",
    # the curve: bits by rank, by codes, and shared out
    *(
        f"rank={rank} residual={coder} num_bits={bits} {_BARE}"
        for coder in ("vq", "nf", "aqlm")
        for rank, bits in ((8, 2), (8, 3))
    ),
    f"rank=0 {_BARE}",
    f"rank=16 {_BARE}",
    f"rank=16 num_bits=3 {_BARE}",
    *(f"target_bits={bits} {_BARE}" for bits in (2.15, 2.95, 3.75, 4.95)),
    f"rank=8 low_rank_bits=16 {_BARE}",
    f"rank=8 permute=true {_BARE}",
)
RECIPE = """
ALGORITHM: ReALLM
JOB_SERVICE: Kompress
JOB_ID: benchmark
TEXT_COLUMN: text
EXPORT: [reallm]
llm: {ReALLM: {save_intermediate_results: true, nsamples: 128, model_seqlen: 256}}
"""


def main() -> None:
    """Run the benchmark and print three lines a stage."""
    arguments = arguments_of(__doc__)
    plugin = Reallm(ReallmConfig())
    for setting in arguments.setting or SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            job = run_job(RECIPE, "ReALLM", setting.split(), arguments, Path(folder))
            bits = {name: value / job.bits["parameters"] for name, value in job.bits.items() if name != "parameters"}
            parts = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
            for stage in (CALIBRATION, BLOC, GLOBAL):
                made = Artifact(kind=f"reallm-{stage}", directory=job.folder / "tmp" / stage, digest="")
                if not made.directory.is_dir():
                    continue
                figures = score(plugin.load(made), job.folder, arguments.texts, arguments.skip)
                cost = " + ".join(f"{seconds:.1f}" for name, seconds in job.seconds.items() if name in ("survey", stage))
                told(f"{setting}: {stage}", figures, f"{cost} CPU s\n    {sum(bits.values()):.3f} bits: {parts}")


if __name__ == "__main__":
    main()
