"""What the plugins with uniform codes have in common: their stages, what they refuse, and reading their results back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from algorithms.base import Artifact, CompressionAlgorithm, StageSpec
from algorithms.blockwise.config import BlockwiseParameters
from algorithms.blockwise.pipeline import Pipeline, check_groups
from algorithms.blockwise.uniform_exports import FORMATS, Setting, check_exports
from algorithms.modeling.mixtures.experts import compute_in_float16
from algorithms.modeling.source import ModelSource
from algorithms.numerics.uniform import UniformCodes
from algorithms.workload import Workload


class UniformAlgorithm(CompressionAlgorithm):
    """Stages calibration and conversion.

    A plugin says what its recipe's codes are like (``setting``) and how they are made (``pipeline``). Without an export in the
    recipe, the first of the ``preferred`` formats that holds the codes is written. ``group_key`` is the recipe's key of the
    group size.
    """

    formats = FORMATS
    group_key: ClassVar[str]

    def __init__(self, config: BlockwiseParameters, exports: Sequence[str] = ()) -> None:
        self._setting = self.setting(config)
        super().__init__(config, exports or (self._setting.first_format(self.preferred(self._setting)),))
        self._pipeline = self.pipeline(config, self._setting)

    @staticmethod
    @abstractmethod
    def setting(config: BlockwiseParameters) -> Setting:
        """What decides which formats can hold the codes."""

    @classmethod
    def preferred(cls, setting: Setting) -> Sequence[str]:
        """The formats in the order in which they are tried where the recipe names none."""
        return cls.formats

    @abstractmethod
    def pipeline(self, config: BlockwiseParameters, setting: Setting) -> Pipeline[UniformCodes]:
        """The stages, for ``self.exports``."""

    def preflight(self, source: ModelSource, stages: Sequence[str]) -> None:
        """Refuse groups that do not divide the model's matrices, and formats that cannot hold the codes.

        Raises:
            ValueError: what is wrong, and which key to change.
        """
        if "calibration" in stages:
            check_groups(source, self._setting.group_size, f"llm.{self.name}.{self.group_key}")
        if "conversion" in stages:
            check_exports(self._setting, self.exports, source)

    def stages(self) -> Sequence[StageSpec]:
        """Calibration and conversion."""
        return self._pipeline.specs()

    def workloads(self, source: ModelSource, tokens: Mapping[str, int]) -> Mapping[str, Workload]:
        """Of the calibration; see :meth:`Pipeline.workloads`."""
        return self._pipeline.workloads(source, tokens)

    def open(self, artifact: Artifact) -> nn.Module:
        """A calibration or an export as a float32 model."""
        return self._pipeline.open(artifact)

    def bits(self, artifact: Artifact) -> Mapping[str, float]:
        """Stored bits by component, and the number of compressed weights."""
        return self._pipeline.bits(artifact)

    def as_served(self, model: nn.Module, artifact: Artifact, source: ModelSource, client: str | None = None) -> nn.Module:
        """The same, but that transformers unpacks experts of a mixture in float16 when it reads compressed-tensors."""
        if client == "compressed-tensors":
            compute_in_float16(model)
        return model
