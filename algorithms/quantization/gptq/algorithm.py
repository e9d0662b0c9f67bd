"""GPTQ: codes that make up for each other's errors, column by column (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.blockwise.pipeline import check_groups
from algorithms.blockwise.uniform_exports import FORMATS, Setting, check_exports
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.modeling.source import ModelSource
from algorithms.quantization.gptq.calibration import fit
from algorithms.quantization.gptq.config import GptqConfig


class Gptq(CompressionAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "GPTQ"
    formats = FORMATS

    def __init__(self, config: GptqConfig, exports: Sequence[str] = ()) -> None:
        self._setting = setting(config)
        super().__init__(config, exports or (self._setting.first_format(),))
        self._group_size = config.group_size
        self._pipeline = uniform_pipeline(
            name="gptq",
            config=config,
            fit=lambda wanted, statistics, spread: fit(wanted, statistics, config),
            setting=self._setting,
            exports=self.exports,
        )

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse groups that do not divide the model's matrices, and formats that cannot hold the codes.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        if "calibration" in stages:
            check_groups(source, self._group_size, "llm.GPTQ.groupsize")
        if "conversion" in stages:
            check_exports(self._setting, self.exports, source)

    def stages(self) -> Sequence[StageSpec]:
        """Calibration and conversion."""
        return self._pipeline.specs()

    def load(self, artifact: Artifact) -> nn.Module:
        """A calibration or an export as a float32 model."""
        return self._pipeline.load(artifact)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits by component, and the number of compressed weights."""
        return self._pipeline.bits(artifact)


def setting(config: GptqConfig) -> Setting:
    """What decides which formats can hold the codes."""
    scattered = config.act_order and not config.static_groups and config.group_size != -1
    return Setting(bits=config.bits, symmetric=config.symmetric, group_size=config.group_size, has_column_groups=scattered)
