"""Presets in the size of tiny models."""

from __future__ import annotations

from collections.abc import Sequence

from algorithms.quantization.lmquant.algorithm import Lmquant
from algorithms.quantization.lmquant.config import LmquantConfig
from algorithms.quantization.lmquant.presets import over
from tests.unit.algorithms.quantization.plugin_runs import TEXT


def grouped(preset: str, size: int) -> dict[str, object]:
    """The key that gives a preset with groups groups of this size."""
    return {"wgts": {"group_shapes": [[1, -1], [1, size]] if preset == "g128" else [[1, size]]}}


def algorithm(
    preset: str, exports: Sequence[str] = (), *, size: int = 16, quant: dict | None = None, **keys: object
) -> Lmquant:
    """The plugin with a preset, its groups made small; ``quant`` are further keys of that block."""
    own = grouped(preset, size) if preset in ("g128", "awq", "gptq", "w4a8kv4_sym") else {}
    return Lmquant(
        LmquantConfig.model_validate({**TEXT, "quant_type": preset, "quant": over(own, quant or {}), **keys}), exports
    )
