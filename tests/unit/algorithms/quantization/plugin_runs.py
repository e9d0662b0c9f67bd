"""Plugins run stage by stage on tiny models, whole or killed in the middle."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from algorithms.base import Artifact, CompressionAlgorithm, StageContext
from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import ALONE, Ranks
from tests.support.models import token_sequences

TEXT = {"nsamples": 8, "model_seqlen": 16, "val_size": 2}


@contextlib.contextmanager
def _silent(description, total):
    yield lambda note: None


class KilledError(Exception):
    """In the place of a kill."""


def killed_at(block: int) -> Callable:
    """A progress display that ends a stage when so many blocks are done."""

    @contextlib.contextmanager
    def progress(description, total):
        def advance(note):
            if note.startswith(f"block {block}"):
                raise KilledError

        yield advance

    return progress


def _context(
    algorithm: CompressionAlgorithm, source: ModelSource, folder: Path, name: str, progress: Callable, ranks: Ranks = ALONE
) -> StageContext:
    (request,) = (spec.tokens for spec in algorithm.stages() if spec.name == name)
    sequences, held_out = [], 0
    if request is not None:
        sequences, held_out = token_sequences(request.num_samples, request.sequence_length), request.validation_samples
    return StageContext(
        source=source,
        tokens=sequences[held_out:],
        validation_tokens=sequences[:held_out],
        output_dir=folder,
        scratch_dir=folder.parent / "scratch",
        device=torch.device("cpu"),
        seed=0,
        metrics=lambda record: None,
        progress=progress,
        ranks=ranks,
    )


def run(algorithm: CompressionAlgorithm, source: ModelSource, folder: Path) -> list[Artifact]:
    """What every stage leaves below ``folder``; the stages get the tokens they ask for and no others."""
    artifact = Artifact(kind="model", directory=source.directory, digest="base")
    artifacts = []
    for spec in algorithm.stages():
        directory = folder / spec.directory
        directory.mkdir(parents=True, exist_ok=True)
        artifact = spec.run(_context(algorithm, source, directory, spec.name, _silent), artifact)
        artifacts.append(artifact)
    return artifacts


def calibrate(
    algorithm: CompressionAlgorithm, source: ModelSource, folder: Path, progress: Callable = _silent, ranks: Ranks = ALONE
) -> Artifact:
    """The first stage alone, in ``folder`` itself; one of ``ranks`` where all of them call this."""
    base = Artifact(kind="model", directory=source.directory, digest="base")
    return run_stage(algorithm, source, folder, algorithm.stages()[0].name, base, progress, ranks)


def run_stage(
    algorithm: CompressionAlgorithm,
    source: ModelSource,
    folder: Path,
    name: str,
    artifact: Artifact,
    progress: Callable = _silent,
    ranks: Ranks = ALONE,
) -> Artifact:
    """One stage, in ``folder`` itself, from what an earlier one has left."""
    folder.mkdir(parents=True, exist_ok=True)
    (spec,) = (spec for spec in algorithm.stages() if spec.name == name)
    return spec.run(_context(algorithm, source, folder, name, progress, ranks), artifact)


def assert_resumes(algorithm: CompressionAlgorithm, source: ModelSource, folder: Path) -> None:
    """Killed after each of its first two blocks, a calibration of three keeps those and ends like one that was not."""
    whole, broken = calibrate(algorithm, source, folder / "whole"), folder / "broken"
    kept = {}
    for block in (1, 2):
        with pytest.raises(KilledError):
            calibrate(algorithm, source, broken, killed_at(block))
        assert (broken / f"{block - 1}.safetensors").is_file()
        assert not (broken / f"{block}.safetensors").exists()
        kept[f"{block - 1}.safetensors"] = (broken / f"{block - 1}.safetensors").stat().st_mtime_ns
    resumed = calibrate(algorithm, source, broken)
    assert {name: (broken / name).stat().st_mtime_ns for name in kept} == kept
    for index in range(3):
        expected, found = (load_file(at / f"{index}.safetensors") for at in (whole.directory, broken))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert blocks(resumed, "linears") == blocks(whole, "linears")


def blocks(calibrated: Artifact, key: str) -> list:
    """One figure of every block's report."""
    return [report[key] for report in json.loads((calibrated.directory / "calibration.json").read_text())["blocks"]]


def logits(model: nn.Module) -> Tensor:
    """Of two sequences that nothing was calibrated on."""
    with torch.no_grad():
        return model(input_ids=torch.cat(token_sequences(2, 20, seed=5)), use_cache=False).logits


def base_logits(source: ModelSource) -> Tensor:
    """Of the uncompressed model."""
    names: Sequence[str] = list(source.weight_files)
    return logits(source.model_from(source.tensors(names, torch.float32)))


def export_folder(converted: Artifact, algorithm: CompressionAlgorithm, name: str) -> Path:
    """Where an export lies."""
    return converted.directory if algorithm.exports[0] == name else converted.directory / "exports" / name
