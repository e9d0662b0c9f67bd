"""The finetune stage on tiny models, as its tests run it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from algorithms.base import Artifact, StageContext
from algorithms.modeling.source import ModelSource
from algorithms.quantization.aqlm.algorithm import Aqlm
from algorithms.quantization.aqlm.config import AqlmConfig
from tests.support.models import confident, save_family, token_sequences

CALIBRATION = {
    "nsamples": 8, "model_seqlen": 16, "val_size": 0, "num_codebooks": 2, "nbits_per_codebook": 4, "in_group_size": 4,
    "finetune_max_epochs": 0,
}  # fmt: skip
TUNING = {
    "model_seqlen": 16, "max_epochs": 2, "batch_size": 4, "microbatch_size": 2, "lr": 3e-3, "code_lr": 0.05,
    "code_trust_ratio": None, "max_code_change_per_step": 0.1, "eval_datasets": [], "beam_size": 2,
}  # fmt: skip


class KilledError(Exception):
    """Stands for a kill."""


def algorithm_of(**changes: object) -> Aqlm:
    """The plugin with a small calibration and tuning; ``changes`` are keys of the latter."""
    blocks = {"calibration_config": CALIBRATION, "finetune_config": {**TUNING, **changes}}
    return Aqlm(AqlmConfig.model_validate(blocks))


@contextlib.contextmanager
def _silent(description, total):
    yield lambda note: None


def killed_at(step: int) -> Callable:
    """A progress display that ends the stage at a step."""

    @contextlib.contextmanager
    def progress(description, total):
        done = 0

        def advance(note):
            nonlocal done
            done += 1
            if done == step and note != "done before":
                raise KilledError

        yield advance

    return progress


def context_of(source: ModelSource | None, folder: Path, **changes: object) -> StageContext:
    """What a stage is given, on the CPU and alone unless ``changes`` say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "source": source, "tokens": token_sequences(10, 16), "validation_tokens": (), "output_dir": folder,
        "scratch_dir": folder, "device": torch.device("cpu"), "seed": 0, "metrics": lambda record: None, "progress": _silent,
    }  # fmt: skip
    return StageContext(**{**settings, **changes})


def calibrate(folder: Path, family: str = "llama", **changes: object) -> tuple[ModelSource, Artifact]:
    """A model of the family with confident distributions, and its calibration."""
    source = ModelSource(confident(save_family(folder / "base", family, **changes)))
    spec = algorithm_of().stages()[0]
    base = Artifact(kind="model", directory=source.directory, digest="base")
    return source, spec.run(context_of(source, folder / "calibration"), base)


def tune(
    source: ModelSource, calibrated: Artifact, folder: Path, *, context: Mapping[str, object] = {}, **changes: object
) -> Artifact:
    """The finetune stage in a folder; ``context`` changes what it is given, ``changes`` its keys."""
    spec = next(spec for spec in algorithm_of(**changes).stages() if spec.name == "finetune")
    return spec.run(context_of(source, folder, **dict(context)), calibrated)


def report_of(artifact: Artifact) -> dict:
    """The losses and evaluations of a tuning."""
    return json.loads((artifact.directory / "tuning.json").read_text())
