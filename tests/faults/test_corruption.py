"""One byte of every kind of file of a finished job is flipped; models come damaged from the start; two runs meet."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.kill import job_of, result
from tests.faults.warm_process import ROOT

MODEL = ROOT / "examples" / "quickstart" / "model"
# A file of a finished job, and the stages that are made again for it. None of the rest is touched.
KINDS = {
    "model.safetensors": [],
    "config.json": [],
    "tokenizer.json": [],
    "generation_config.json": [],
    "exports/dense/model.safetensors": [],
    "exports/dense/tokenizer_config.json": [],
    "certificate.json": [],
    "README.md": [],
    "tmp/converted/model.safetensors": ["conversion"],
    "tmp/converted/tokenizer.json": ["conversion"],
    "tmp/converted/exports/dense/config.json": ["conversion"],
}  # fmt: skip
EARLIER = {
    "tmp/calibration/1.safetensors": ["calibration", "finetune", "conversion"],
    "tmp/calibration/2.json": ["calibration", "finetune", "conversion"],
    "tmp/calibration/not_quantized_weights.safetensors": ["calibration", "finetune", "conversion"],
    "tmp/finetune/0.safetensors": ["finetune", "conversion"],
    "tmp/finetune/tuning.json": ["finetune", "conversion"],
    "tmp/finetune/tokenizer.json": ["finetune", "conversion"],
}


def flip(path: Path, at: float = 0.5) -> None:
    """Exchange one bit of a file, without touching another name of the same file."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.unlink()
    path.write_bytes(bytes(content))


def times(job: Path) -> dict[str, str]:
    """When each stage of a job was finished, and of which attempt."""
    stages = json.loads((job / "manifest.json").read_text())["stages"]
    return {name: f"{stage['finished']} {stage['attempts']} {stage['wall_s']}" for name, stage in stages.items()}


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte_is_found_and_named_and_only_what_follows_is_made_again(run, finished, expected, name):
    job = job_of(finished)
    before = times(job)
    flip(job / name)
    done = run(finished)
    assert done.code == 0, done.said
    assert name.removeprefix("tmp/converted/") in done.said, done.said
    assert result(finished) == expected
    assert [stage for stage in before if before[stage] != times(job)[stage]] == KINDS[name]


@pytest.mark.parametrize("name", EARLIER)
def test_a_flipped_byte_of_an_earlier_stage_is_found_when_it_is_read(run, finished, expected, name):
    job = job_of(finished)
    before = times(job)
    flip(job / name)
    (job / "tmp" / "converted" / "config.json").unlink()
    if name.startswith("tmp/calibration"):
        shutil.rmtree(job / "tmp" / "finetune")
    done = run(finished)
    assert done.code == 0, done.said
    assert f"{Path(name).name} has other content than was written" in done.said, done.said
    assert result(finished) == expected
    assert [stage for stage in before if before[stage] != times(job)[stage]] == EARLIER[name]


def test_a_flipped_byte_of_the_manifest_is_no_traceback(run, finished):
    path = job_of(finished) / "manifest.json"
    flip(path, at=0.0)
    done = run(finished)
    assert done.code == 2
    assert str(path) in done.said
    assert "Traceback" not in done.said
