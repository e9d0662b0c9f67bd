"""GPTQ: codes that make up for each other's errors, column by column (arXiv 2210.17323)."""

from __future__ import annotations

from algorithms.blockwise.pipeline import Pipeline
from algorithms.blockwise.uniform_algorithm import UniformAlgorithm
from algorithms.blockwise.uniform_exports import Setting
from algorithms.blockwise.uniform_method import uniform_pipeline
from algorithms.numerics.uniform import UniformCodes
from algorithms.quantization.gptq.calibration import fit
from algorithms.quantization.gptq.config import GptqConfig


class Gptq(UniformAlgorithm):
    """The plugin: stages calibration and conversion."""

    name = "GPTQ"
    group_key = "groupsize"

    @staticmethod
    def setting(config: GptqConfig) -> Setting:
        """What decides which formats can hold the codes."""
        scattered = config.act_order and not config.static_groups and config.group_size != -1
        return Setting(bits=config.bits, symmetric=config.symmetric, group_size=config.group_size, has_column_groups=scattered)

    def pipeline(self, config: GptqConfig, setting: Setting) -> Pipeline[UniformCodes]:
        """A sweep under the Hessian of each group's input."""
        return uniform_pipeline(
            name="gptq",
            config=config,
            fit=lambda wanted, statistics, spread: fit(wanted, statistics, config),
            setting=setting,
            exports=self.exports,
        )
