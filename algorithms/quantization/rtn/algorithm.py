"""RTN: every weight rounded to the nearest code of its group's grid."""

from __future__ import annotations

from algorithms.blockwise.pipeline import Pipeline
from algorithms.blockwise.uniform_algorithm import UniformAlgorithm
from algorithms.blockwise.uniform_exports import Setting
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.numerics.uniform import UniformCodes
from algorithms.quantization.rtn.calibration import fit
from algorithms.quantization.rtn.config import RtnConfig


class Rtn(UniformAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "RTN"
    group_key = "groupsize"

    @staticmethod
    def setting(config: RtnConfig) -> Setting:
        """What decides which formats can hold the codes."""
        return Setting(bits=config.bits, symmetric=config.symmetric, group_size=config.group_size)

    def pipeline(self, config: RtnConfig, setting: Setting) -> Pipeline[UniformCodes]:
        """Rounding, which needs a text for learned rounding alone."""
        return uniform_pipeline(
            name="rtn",
            config=config,
            fit=lambda wanted, statistics, spread: fit(wanted, config),
            setting=setting,
            exports=self.exports,
            needs_text=config.block_tuning is not None,
        )
