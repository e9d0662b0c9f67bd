"""The engine: trtllm-build compiles a checkpoint for the GPUs of this machine."""

from __future__ import annotations

import logging
import shlex
import shutil

from algorithms.base import Artifact, StageContext, StageError
from algorithms.engines.tensorrt_llm.calibration import family, write_bits
from algorithms.engines.tensorrt_llm.commands import build_command, checkpoint_name, run_command
from algorithms.engines.tensorrt_llm.config import TensorRtLlmConfig
from algorithms.engines.tensorrt_llm.programs import run_program

logger = logging.getLogger(__name__)

KIND = "tensorrtllm-engine"
LOG = "build.log"
_SCRIPTS = ("run.py", "utils.py")  # run.py of the examples imports its neighbour


def build_engine(config: TensorRtLlmConfig, context: StageContext, given: Artifact) -> Artifact:
    """The stage: ``rank*.engine``, config.json, and TensorRT-LLM's script that runs them.

    Raises:
        StageError: trtllm-build failed, or left fewer engines than there are GPUs.
    """
    row, output = family(context.source, config), context.output_dir
    for stale in output.glob("*.engine"):
        stale.unlink()
    command = build_command(row, config, checkpoint=given.directory / checkpoint_name(row, config), output=output)
    with context.progress("engine", 1) as step:
        run_program(command, output / LOG, working_dir=context.scratch_dir)
        step(command[0])
    engines = [output / f"rank{rank}.engine" for rank in range(config.gpus)]
    absent = [file.name for file in (*engines, output / "config.json") if not file.is_file()]
    if absent:
        raise StageError(f"{command[0]} ended well and left no {', '.join(absent)} in {output}; see {output / LOG}.")
    write_bits(context, "engine", engines)
    for name in _SCRIPTS:
        if (config.examples_dir / name).is_file():
            shutil.copyfile(config.examples_dir / name, output / name)
    shown = shlex.join(run_command(context.source.directory, "."))
    logger.info("To run the engine, in the job folder: %s", shown)
    return Artifact(kind=KIND, directory=output, digest="")
