"""AWQ: factors for input channels, found from what flows through them, make weights easier to round (arXiv 2306.00978)."""

from __future__ import annotations

from collections.abc import Sequence

from algorithms.blockwise.pipeline import Pipeline
from algorithms.blockwise.uniform_algorithm import UniformAlgorithm
from algorithms.blockwise.uniform_exports import Setting
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.numerics.uniform import UniformCodes
from algorithms.quantization.awq.calibration import fit
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.awq.search import ScaleSearch

_SPELLING = (("wbits", "W_BIT"), ("groupsize", "Q_GROUP_SIZE"), ("sym: true", "ZERO_POINT: false"))


class Awq(UniformAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "AutoAWQ"
    formats = AwqConfig.export_formats
    group_key = "Q_GROUP_SIZE"

    @staticmethod
    def setting(config: AwqConfig) -> Setting:
        """What decides which formats can hold the codes."""
        return Setting(
            bits=config.bits,
            symmetric=not config.zero_point,
            group_size=config.group_size,
            awq_version=config.awq_version.lower(),
            spelling=_SPELLING,
        )

    @classmethod
    def preferred(cls, setting: Setting) -> Sequence[str]:
        """AWQ's own format first where there are zero points: without, other formats have clients that run everywhere."""
        return cls.formats[1:] if setting.symmetric else cls.formats

    def pipeline(self, config: AwqConfig, setting: Setting) -> Pipeline[UniformCodes]:
        """Factors first, then codes."""
        return uniform_pipeline(
            name="awq",
            config=config,
            fit=lambda wanted, statistics, spread: fit(wanted, statistics, config),
            setting=setting,
            exports=self.exports,
            prepare=ScaleSearch(config).prepare,
        )
