"""Every preset: its settings, written out from what its authors publish and its file changes; naming it is spelling it."""

from pathlib import Path

import pytest

from algorithms.quantization.lmquant.config import LmquantConfig
from algorithms.quantization.lmquant.presets import ALIASES, FOLDER, PRESETS, over, preset
from algorithms.quantization.lmquant.settings import (
    ActivationSetting,
    CacheSetting,
    GptqKernel,
    RangeSearch,
    Reorder,
    Rotation,
    Settings,
    Smoothing,
    WeightSetting,
)

ABS_MAX = (("AbsMax", "AbsMax"),)
ROWS = {"group_size": -1, "progressive": False}
GROUPS = {"group_size": 128, "progressive": False}
KV4 = CacheSetting(bits=4, symmetric=False, group_size=128, skip_q=True)
KV8 = CacheSetting(bits=8, symmetric=True, group_size=-1)
CLIPPED = RangeSearch(objective="OutputsError", degree=2, num_grids=80, max_shrink=0.2, max_expand=1)
HALVED = RangeSearch(objective="OutputsError", degree=2, num_grids=20, max_shrink=0.5, max_expand=1)
NONE = dict.fromkeys(("weights", "inputs", "cache", "range_search", "gptq", "rotation", "reorder", "smooth_xw", "smooth_yx"))


def _fixed(alpha, beta, *skips):
    return Smoothing(alpha=alpha, beta=beta, num_grids=0, degree=2, ranges=ABS_MAX, skips=skips)


def _searched(alpha, beta, *skips):
    return Smoothing(alpha=alpha, beta=beta, num_grids=20, degree=2, ranges=ABS_MAX, skips=skips)


QOQ = {"inputs": ActivationSetting(bits=8), "gptq": GptqKernel(damping=0.01), "rotation": Rotation(random=False)}
SMOOTHQUANT = {
    "weights": WeightSetting(bits=8, symmetric=True, **ROWS),
    "inputs": ActivationSetting(bits=8),
    "smooth_xw": _fixed(0.85, 0.15, "proj_out", "proj_2nd"),
}
EXPECTED = {
    "gchn": (1024, {
        **QOQ, "weights": WeightSetting(bits=4, symmetric=False, **ROWS), "cache": KV4, "range_search": CLIPPED,
        "smooth_xw": _fixed(0.1, 0.9, "proj_qkv", "proj_1st"), "smooth_yx": _searched(0.5, -2),
    }),
    "gchn_kv8": (1024, {
        **QOQ, "weights": WeightSetting(bits=4, symmetric=True, **ROWS), "cache": KV8, "range_search": CLIPPED,
        "smooth_xw": _fixed(0.05, 0.95, "proj_qkv", "proj_1st"), "smooth_yx": _searched(0.5, -2),
    }),
    "g128": (1024, {
        **QOQ, "weights": WeightSetting(bits=4, symmetric=False, group_size=128, progressive=True), "cache": KV4,
        "range_search": HALVED,
        "reorder": Reorder(metric="InputsAbsMax", index="Sequential", strategy="Manual"),
        "smooth_xw": _fixed(0.3, 0.7, "proj_qkv", "proj_1st"), "smooth_yx": _fixed(0.5, 0),
    }),
    "sq_dynamic": (512, {**SMOOTHQUANT, "cache": KV8}),
    "sq_static": (512, {**SMOOTHQUANT, "cache": CacheSetting(bits=8, symmetric=True, group_size=-1, static=True)}),
    "awq": (512, {
        "weights": WeightSetting(bits=4, symmetric=False, **GROUPS), "smooth_xw": _searched(0.5, 0),
        "range_search": RangeSearch(
            objective="ProductsError", degree=2, num_grids=20, max_shrink=0.8, max_expand=1,
            skips=("proj_qkv",),
        ),
    }),
    "gptq": (2048, {
        "weights": WeightSetting(bits=4, symmetric=False, **GROUPS), "gptq": GptqKernel(damping=0.01),
        "range_search": RangeSearch(
            objective="TensorError", degree=2.4, num_grids=100, max_shrink=0.2, max_expand=1
        ),
    }),
    "w4a8kv4_sym": (1024, {
        **QOQ, "weights": WeightSetting(bits=4, symmetric=True, **GROUPS), "cache": KV4,
        "range_search": HALVED,
        "smooth_xw": _searched(0.5, -2, "proj_qkv", "proj_1st"), "smooth_yx": _fixed(0.5, 0),
    }),
}  # fmt: skip


def test_every_file_is_a_preset_and_every_preset_a_file():
    assert {file.stem for file in FOLDER.iterdir()} == set(PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_is_written_here(name):
    config = LmquantConfig.model_validate({"quant_type": name})
    length, settings = EXPECTED[name]
    assert config.settings == Settings(**{**NONE, **settings})
    assert (config.num_samples, config.sequence_length) == (128, length)
    assert not config.evaluate_only


@pytest.mark.parametrize("name", PRESETS)
def test_naming_a_preset_is_spelling_it(name):
    named, spelled = LmquantConfig.model_validate({"quant_type": name}), LmquantConfig.model_validate(preset(name))
    assert spelled.quant_type == "llm"
    assert named.shaping == spelled.shaping
    assert (named.num_samples, named.sequence_length) == (spelled.num_samples, spelled.sequence_length)
    assert spelled.warnings() == ()


def test_all_presets_differ():
    shaping = [LmquantConfig.model_validate({"quant_type": name}).shaping for name in PRESETS]
    assert all(one != other for number, one in enumerate(shaping) for other in shaping[:number])


def test_other_names_of_presets():
    for alias, name in ALIASES.items():
        config = LmquantConfig.model_validate({"quant_type": alias})
        assert (config.quant_type, config.shaping) == (name, LmquantConfig.model_validate({"quant_type": name}).shaping)
    assert LmquantConfig().shaping == LmquantConfig.model_validate({"quant_type": "default"}).shaping


def test_a_recipe_wins_key_by_key():
    config = LmquantConfig.model_validate(
        {"quant_type": "gchn", "nsamples": 4, "quant.smooth.xw.alpha": 0.2, "quant": {"opts": {"skip_attn_v": True}}}
    )
    settings = EXPECTED["gchn"][1]
    changed = {
        "cache": CacheSetting(bits=4, symmetric=False, group_size=128, skip_q=True, skip_v=True),
        "smooth_xw": _fixed(0.2, 0.9, "proj_qkv", "proj_1st"),
    }
    assert config.settings == Settings(**{**NONE, **settings, **changed})
    assert (config.num_samples, config.sequence_length) == (4, 1024)
    plain = LmquantConfig.model_validate({"quant_type": "gchn"})
    assert plain.settings == Settings(**{**NONE, **settings})  # the file that both read is as it was


def test_over_takes_blocks_together_and_replaces_lists():
    defaults = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}
    assert over(defaults, {"a": {"c": [3]}, "d": 2, "f": None}) == {"a": {"b": 1, "c": [3]}, "d": 2, "f": None}
    assert defaults == {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}}


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_says_what_it_is_and_how_it_runs(name):
    head = Path(FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in head)
    assert any(f"configs/presets/lmquant/{name}.yaml" in line for line in head)
    assert any("arXiv:" in line for line in head)
    assert any("nyuntam" in line for line in head)
