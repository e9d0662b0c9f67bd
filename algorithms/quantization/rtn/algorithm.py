"""RTN: every weight rounded to the nearest code of its group's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.blockwise.pipeline import check_groups
from algorithms.blockwise.uniform_exports import FORMATS, Setting, check_exports
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.modeling.source import ModelSource
from algorithms.quantization.rtn.calibration import fit
from algorithms.quantization.rtn.config import RtnConfig


class Rtn(CompressionAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "RTN"
    formats = FORMATS

    def __init__(self, config: RtnConfig, exports: Sequence[str] = ()) -> None:
        self._setting = setting(config)
        super().__init__(config, exports or (self._setting.first_format(),))
        self._group_size = config.group_size
        self._pipeline = uniform_pipeline(
            name="rtn",
            config=config,
            fit=lambda wanted, statistics, spread: fit(wanted, config),
            setting=self._setting,
            exports=self.exports,
            needs_text=config.block_tuning is not None,
        )

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse groups that do not divide the model's matrices, and formats that cannot hold the codes.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        if "calibration" in stages:
            check_groups(source, self._group_size, "llm.RTN.groupsize")
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


def setting(config: RtnConfig) -> Setting:
    """What decides which formats can hold the codes."""
    return Setting(bits=config.bits, symmetric=config.symmetric, group_size=config.group_size)
