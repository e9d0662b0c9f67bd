"""ReALLM's stages on tiny models."""

from __future__ import annotations

import json
from collections.abc import Sequence

from safetensors.torch import load_file

from algorithms.base import Artifact
from algorithms.formats.reallm.packed import LAYOUT, unpack
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.quantization.reallm.algorithm import Reallm
from algorithms.quantization.reallm.config import ReallmConfig
from tests.unit.algorithms.quantization.plugin_runs import TEXT

BLOCK_TUNING = {"max_epochs": 2, "batch_size": 2}
GLOBAL_TUNING = {"nsamples": 8, "model_seqlen": 16, "max_epochs": 2, "batch_size": 4, "val_size": 2}


def reallm(exports: Sequence[str] = (), **keys: object) -> Reallm:
    """The plugin with keys of its block; neither tuning unless they ask for it."""
    values = {**TEXT, "rank": 4, "iterations": 2, "block_tuning": None, **keys}
    return Reallm(ReallmConfig.model_validate(values), exports)


def weights(made: Artifact, index: int = 0) -> dict[str, LowRankWeight]:
    """What a stage has made of a block's linears."""
    tensors = load_file(made.directory / f"{index}.safetensors")
    return {name: unpack(tensors, name) for name in LAYOUT.packed_linears(list(tensors))}


def facts(made: Artifact) -> dict:
    """calibration.json of a stage."""
    return json.loads((made.directory / "calibration.json").read_text())
