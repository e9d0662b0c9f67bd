"""The one table of algorithms: their names, and where their configuration and their code are.

Nothing here imports torch: a configuration is found by its path, and only :func:`algorithm_class` imports the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from configs.errors import UnknownAlgorithm
from configs.strict import AlgorithmParameters


@dataclass(frozen=True, kw_only=True)
class Row:
    """One algorithm. Paths are ``module:Class``; ``aliases`` are further names that a recipe may use for it."""

    name: str
    config_path: str
    class_path: str
    summary: str
    aliases: tuple[str, ...] = ()


REGISTRY = (
    Row(
        name="GPTQ",
        aliases=("gptq",),
        config_path="algorithms.quantization.gptq.config:GptqConfig",
        class_path="algorithms.quantization.gptq.algorithm:Gptq",
        summary="2 to 8 bits a weight, codes that make up for each other's errors; loads with transformers and vLLM",
    ),
    Row(
        name="AutoAWQ",
        aliases=("AWQ", "awq"),
        config_path="algorithms.quantization.awq.config:AwqConfig",
        class_path="algorithms.quantization.awq.algorithm:Awq",
        summary="2 to 8 bits a weight, input channels scaled by what flows through them; AWQ's own format among others",
    ),
    Row(
        name="LMQuant",
        aliases=("lmquant", "QoQ"),
        config_path="algorithms.quantization.lmquant.config:LmquantConfig",
        class_path="algorithms.quantization.lmquant.algorithm:Lmquant",
        summary="QoQ: 4-bit weights, 8-bit activations, 4-bit KV cache, for QServe and vLLM; SmoothQuant among its presets",
    ),
    Row(
        name="FlapPruner",
        aliases=("FLAP", "flap"),
        config_path="algorithms.pruning.flap.config:FlapConfig",
        class_path="algorithms.pruning.flap.algorithm:FlapPruner",
        summary="structured pruning of heads and neurons; what is left is refitted; loads as a plain model",
    ),
    Row(
        name="SpQR",
        aliases=("SPQR", "spqr"),
        config_path="algorithms.quantization.spqr.config:SpqrConfig",
        class_path="algorithms.quantization.spqr.algorithm:Spqr",
        summary="2 to 4 bits a weight in groups of 16 with two-level statistics, and a few outliers kept as they are",
    ),
    Row(
        name="RTN",
        aliases=("rtn",),
        config_path="algorithms.quantization.rtn.config:RtnConfig",
        class_path="algorithms.quantization.rtn.algorithm:Rtn",
        summary="2 to 8 bits a weight by rounding to nearest, without data; or with rounding learned block by block",
    ),
    Row(
        name="AQLM",
        aliases=("aqlm",),
        config_path="algorithms.quantization.aqlm.config:AqlmConfig",
        class_path="algorithms.quantization.aqlm.algorithm:Aqlm",
        summary="additive quantization, 2 to 4 bits a weight: learned codebooks, block tuning",
    ),
    Row(
        name="ReALLM",
        aliases=("REALLM", "reallm"),
        config_path="algorithms.quantization.reallm.config:ReallmConfig",
        class_path="algorithms.quantization.reallm.algorithm:Reallm",
        summary="a vector-quantized residual and a low-rank part, about 3 bits a weight; goes on as a DoRA adapter in PEFT",
    ),
    Row(
        name="TensorRTLLM",
        aliases=("tensorrtllm",),
        config_path="algorithms.engines.tensorrt_llm.config:TensorRtLlmConfig",
        class_path="algorithms.engines.tensorrt_llm.algorithm:TensorRtLlm",
        summary="engines for NVIDIA GPUs by NVIDIA's own programs, which it calls where they are installed",
    ),
)


def rows() -> tuple[Row, ...]:
    """Every algorithm of this version."""
    return REGISTRY


def find(name: str) -> Row:
    """The row of an algorithm, by its name or one of its aliases.

    Raises:
        UnknownAlgorithm: no row has the name; it lists those that there are.
    """
    for row in REGISTRY:
        if name in (row.name, *row.aliases):
            return row
    raise UnknownAlgorithm(name, [row.name for row in REGISTRY])


def config_class(name: str) -> type[AlgorithmParameters]:
    """The class that types the algorithm's block of a recipe. Does not import torch.

    Raises:
        UnknownAlgorithm: no row has the name.
    """
    return _imported(find(name).config_path)


def algorithm_class(name: str) -> type:
    """The plugin itself. Imports torch.

    Raises:
        UnknownAlgorithm: no row has the name.
    """
    return _imported(find(name).class_path)


def _imported(path: str) -> type:
    """The class at ``module:Class``."""
    module, _, attribute = path.partition(":")
    return vars(import_module(module))[attribute]
