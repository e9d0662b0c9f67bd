"""TensorRT-LLM: engines for NVIDIA GPUs, quantized and built by NVIDIA's own programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.engines.tensorrt_llm import calibration, engine
from algorithms.engines.tensorrt_llm.commands import (
    BUILDER,
    PYTHON,
    Command,
    build_command,
    checkpoint_command,
    checkpoint_name,
    checkpoint_script,
)
from algorithms.engines.tensorrt_llm.config import STAGES, TensorRtLlmConfig
from algorithms.engines.tensorrt_llm.families import RELEASES, ROW
from algorithms.engines.tensorrt_llm.programs import require
from algorithms.modeling.source import ModelSource
from configs.errors import MissingEnvironmentError


class TensorRtLlm(CompressionAlgorithm):
    """The plugin: stages checkpoint and engine."""

    name = "TensorRTLLM"
    formats = TensorRtLlmConfig.export_formats
    loads = False

    def __init__(self, config: TensorRtLlmConfig, exports: Sequence[str] = ()) -> None:
        super().__init__(config, exports)
        self._config = config

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse models and quantizations that do not go together, and a machine without TensorRT-LLM.

        Raises:
            ValueError: what is wrong, and which key to change.
            MissingEnvironmentError: what to install.
        """
        if not stages:
            return
        family = calibration.family(source, self._config)
        makes_checkpoint = STAGES[0] in stages
        programs = (BUILDER, PYTHON) if makes_checkpoint else (BUILDER,)
        require(programs, [checkpoint_script(family, self._config)] if makes_checkpoint else [], remedy(self._config))

    def stages(self) -> Sequence[StageSpec]:
        """The checkpoint and the engine."""
        checkpoint, built = STAGES
        return (
            StageSpec(
                name=checkpoint,
                run=lambda context, given: calibration.make_checkpoint(self._config, context),
                directory=checkpoint,
                kind=calibration.KIND,
                settings=self._config.checkpoint_settings,
            ),
            StageSpec(
                name=built,
                run=lambda context, given: engine.build_engine(self._config, context, given),
                directory=built,
                kind=engine.KIND,
                settings=self._config.build_settings,
            ),
        )

    def commands(self, source: ModelSource, output: Path) -> Sequence[Command]:
        """Quantize or convert, then build; the checkpoint stands in ``output``, as does the engine.

        Raises:
            ValueError: the model and the quantization do not go together.
        """
        family, config = calibration.family(source, self._config), self._config
        checkpoint = output / checkpoint_name(family, config)
        return (
            checkpoint_command(family, config, model=source.directory, output=checkpoint),
            build_command(family, config, checkpoint=checkpoint, output=output),
        )

    def open(self, artifact: Artifact) -> nn.Module:
        """Nothing here reads an engine.

        Raises:
            MissingEnvironmentError: always; says where it runs.
        """
        raise MissingEnvironmentError(
            f"{artifact.directory} is TensorRT-LLM's, which alone can run it, on the GPU that it was built for. "
            "The folder's README.md has the command."
        )

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Bits of the weight files, and the number of the model's parameters."""
        return calibration.read_bits(artifact.directory)


def remedy(config: TensorRtLlmConfig) -> str:
    """What to install, and what can be done without."""
    tag = RELEASES[config.release].tag
    return (
        "This algorithm only drives NVIDIA's TensorRT-LLM, which needs an NVIDIA GPU. To install it:\n"
        f"  pip install tensorrt_llm=={tag.removeprefix('v')} --extra-index-url https://pypi.nvidia.com\n"
        f"  git clone --depth 1 --branch {tag} https://github.com/NVIDIA/TensorRT-LLM\n"
        f"and name the examples folder of that repository as {ROW}.examples_dir (now {config.examples_dir}). "
        "Without it, `python main.py plan` prints the commands, to be run elsewhere."
    )
