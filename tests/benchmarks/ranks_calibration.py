"""What a second rank saves of a calibration, and whether the model it leaves is as good.

    python -m tests.benchmarks.ranks_calibration --model DIR --tokens FILE.pt --text NAME=FILE [--text ...] \
        [--ranks 1 --ranks 2] [--setting aqlm-2x8 --setting gptq-3] [--repeat 1]

Calibrates in processes of one thread each, which share nothing but a gloo group on this machine, and prints for each setting
and number of ranks: seconds of wall time (the least of the repeats), their ratio to the first number's, the CPU seconds of the
busiest rank, and perplexities as tests/benchmarks/aqlm_perplexity.py computes them. Wall time says something only where as many
cores are free as there are ranks; CPU seconds, which count what messages cost, say something where they are not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from algorithms.base import Artifact, CompressionAlgorithm, StageContext
from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import ALONE, Ranks
from algorithms.quantization.aqlm.algorithm import Aqlm
from algorithms.quantization.aqlm.config import AqlmConfig
from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.config import GptqConfig
from tests.benchmarks.aqlm_perplexity import read_text, score
from tests.support.rank_processes import run_on_ranks

TEXT = {"nsamples": 128, "model_seqlen": 256}
AQLM = {**TEXT, "val_size": 16, "num_codebooks": 2, "nbits_per_codebook": 8, "in_group_size": 8, "finetune_max_epochs": 8}
SETTINGS = ("aqlm-2x8", "aqlm-2x8+tuning", "gptq-3")
LONGEST = 3600.0  # seconds that one calibration may take


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank has used."""

    wall: float
    cpu: float


def algorithm(setting: str) -> CompressionAlgorithm:
    """The plugin of a setting."""
    if setting == "gptq-3":
        return Gptq(GptqConfig.model_validate({**TEXT, "wbits": 3, "groupsize": 64}))
    tuning = {} if setting.endswith("+tuning") else {"finetune_max_epochs": 0}
    return Aqlm(AqlmConfig.model_validate({"calibration_config": {**AQLM, **tuning}, "finetune_config": None}))


def calibrate(ranks: Ranks, setting: str, model: Path, tokens: Path, folder: Path) -> Measured:
    """One rank of a calibration into ``folder``."""
    stage = algorithm(setting).stages()[0]
    assert stage.tokens is not None
    sequences = torch.load(tokens, weights_only=True)[: stage.tokens.num_samples]
    held_out = stage.tokens.validation_samples
    source = ModelSource(model)
    context = StageContext(
        source=source,
        tokens=sequences[held_out:],
        validation_tokens=sequences[:held_out],
        output_dir=folder,
        scratch_dir=folder / "scratch",
        device=torch.device("cpu"),
        seed=0,
        metrics=lambda record: None,
        progress=_silent,
        ranks=ALONE if ranks.size == 1 else ranks,
    )
    ranks.meet()
    wall, cpu = time.perf_counter(), time.process_time()
    stage.run(context, Artifact(kind="model", directory=model, digest=""))
    return Measured(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def main() -> None:
    """Run the benchmark and print one line a setting and number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--ranks", action="append", type=int)
    parser.add_argument("--setting", action="append", choices=SETTINGS)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    texts = {name: read_text(Path(file)) for name, _, file in (entry.partition("=") for entry in arguments.text)}
    torch.set_num_threads(1)
    for setting in arguments.setting or SETTINGS:
        first = 0.0
        for size in arguments.ranks or (1, 2):
            runs, figures = [], {}
            for _ in range(arguments.repeat):
                with tempfile.TemporaryDirectory() as folder:
                    given = (setting, arguments.model, arguments.tokens, Path(folder))
                    runs.append(slowest(run_on_ranks(calibrate, size, *given, limit=LONGEST)))
                    artifact = Artifact(kind=algorithm(setting).stages()[0].kind, directory=Path(folder), digest="")
                    figures = score(algorithm(setting).load(artifact), arguments.model, texts, 0)
            best = Measured(wall=min(run.wall for run in runs), cpu=min(run.cpu for run in runs))
            first = first or best.wall
            report(f"{setting:16} {size} ranks", best, best.wall / first, figures)


def slowest(ranks: list[Measured]) -> Measured:
    """What the calibration took."""
    return Measured(wall=max(rank.wall for rank in ranks), cpu=max(rank.cpu for rank in ranks))


def report(name: str, measured: Measured, ratio: float, figures: dict[str, float]) -> None:
    """Print one line."""
    mean = math.exp(sum(math.log(value) for value in figures.values()) / len(figures))
    each = " / ".join(f"{value:.2f}" for value in figures.values())
    used = f"{measured.wall:7.2f} s wall  {ratio:.2f}  {measured.cpu:7.2f} s CPU"
    sys.stdout.write(f"{name}  {used}  {each}  geometric mean {mean:.3f}\n")
    sys.stdout.flush()


@contextmanager
def _silent(description: str, total: int):
    yield lambda note: None


if __name__ == "__main__":
    main()
