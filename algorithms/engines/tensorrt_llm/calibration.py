"""The checkpoint: TensorRT-LLM's own scripts quantize or convert the model, calibrating where the method needs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from algorithms.base import Artifact, StageContext, StageError
from algorithms.engines.tensorrt_llm.commands import checkpoint_command, checkpoint_name
from algorithms.engines.tensorrt_llm.config import PLAIN, TensorRtLlmConfig
from algorithms.engines.tensorrt_llm.families import ROW, Family, family_of, told_about
from algorithms.engines.tensorrt_llm.programs import run_program
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource

KIND = "tensorrtllm-checkpoint"
LOG = "checkpoint.log"
BITS = "bits_report.json"
_WEIGHTS = "*.safetensors"


def family(source: ModelSource, config: TensorRtLlmConfig) -> Family:
    """The row of a model's type, with what its converter has to know of the model.

    Raises:
        ValueError: there is none, or not with this quantization; or the recipe contradicts the model.
    """
    found = source.raw_config()
    row = family_of(str(found.get("model_type")), None if config.method == PLAIN else config.method)
    row = told_about(row, found, config.release)
    if config.method != PLAIN or not row.converter.wants_facts:
        return row
    for key, said, own in (
        ("rotary_base", config.rotary_base, row.rotary_base),
        ("hidden_act", config.hidden_act, row.hidden_act),
    ):
        if said not in (None, own):
            raise ValueError(f"{ROW}.{key}: {said} is not the model's, which is {own}; leave the key out.")
    return row


def make_checkpoint(config: TensorRtLlmConfig, context: StageContext) -> Artifact:
    """The stage: a folder ``tllm_checkpoint_...`` with one file of weights a GPU.

    Raises:
        StageError: the script failed, or left no checkpoint.
    """
    row = family(context.source, config)
    folder = context.output_dir / checkpoint_name(row, config)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was stopped
    command = checkpoint_command(row, config, model=context.source.directory, output=folder)
    with context.progress("checkpoint", 1) as step:
        run_program(command, context.output_dir / LOG, working_dir=context.scratch_dir)
        step(command[1])
    if not (folder / "config.json").is_file():
        raise StageError(f"{command[1]} ended well and left no config.json in {folder}; see {context.output_dir / LOG}.")
    write_bits(context, "checkpoint", list(folder.glob(_WEIGHTS)))
    return Artifact(kind=KIND, directory=context.output_dir, digest="")


def write_bits(context: StageContext, component: str, files: list[Path]) -> None:
    """Keep the size of weight files, in bits, beside the number of the model's parameters: no one here reads the files."""
    bits = 8.0 * sum(file.stat().st_size for file in files)
    atomic_write_json(context.output_dir / BITS, {component: bits, "parameters": context.source.num_parameters})


def read_bits(directory: Path) -> dict[str, float]:
    """What :func:`write_bits` has kept."""
    return {name: float(value) for name, value in json.loads((directory / BITS).read_text(encoding="utf-8")).items()}
