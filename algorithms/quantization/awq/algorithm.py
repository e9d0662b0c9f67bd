"""AWQ: factors for input channels, found from what flows through them, make weights easier to round (arXiv 2306.00978)."""

from __future__ import annotations

from algorithms.blockwise.pipeline import Pipeline
from algorithms.blockwise.uniform_algorithm import UniformAlgorithm
from algorithms.blockwise.uniform_exports import Setting
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.numerics.uniform import UniformCodes
from algorithms.quantization.awq.calibration import fit
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.awq.search import ScaleSearch


class Awq(UniformAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "AutoAWQ"
    formats = AwqConfig.export_formats
    group_key = "Q_GROUP_SIZE"

    @staticmethod
    def setting(config: AwqConfig) -> Setting:
        """What decides which formats can hold the codes."""
        return Setting(bits=config.bits, symmetric=not config.zero_point, group_size=config.group_size)

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
