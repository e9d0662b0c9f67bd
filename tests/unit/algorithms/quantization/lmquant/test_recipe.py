"""Recipes of nyuntam's users, read by the loader that reads all: dotted keys, their lines, and overrides on top of them."""

import pytest

from algorithms.quantization.lmquant.config import LmquantConfig
from algorithms.quantization.lmquant.settings import Settings
from algorithms.registry import config_class
from configs.errors import RecipeError
from configs.loader import load_recipe
from tests.unit.algorithms.quantization.lmquant.test_presets import EXPECTED, NONE, _fixed
from tests.unit.algorithms.quantization.lmquant.upstream import EXAMPLE


def _load(text, folder, *overrides):
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides, plugin_config=lambda name: LmquantConfig if name == "LMQuant" else config_class(name))


def _problems(text, folder, *overrides):
    with pytest.raises(RecipeError) as caught:
        _load(text, folder, *overrides)
    return {problem.key: problem for problem in caught.value.problems}


def _line(start):
    return next(number for number, line in enumerate(EXAMPLE.splitlines(), 1) if line.strip().startswith(start))


def test_the_example_of_nyuntam_loads_unchanged(tmp_path):
    loaded = _load(EXAMPLE, tmp_path)
    config = loaded.parameters
    smooth = {"smooth_xw": _fixed(0.05, 0.95, "proj_qkv", "proj_1st")}
    assert config.settings == Settings(**{**NONE, **EXPECTED["gchn"][1], **smooth})
    assert (config.num_samples, config.sequence_length, config.dtype) == (128, 1024, "float32")
    assert config.save_intermediate_results
    assert [line.split(": ")[0] for line in loaded.warnings] == [
        "JOB_PATH (user_data/jobs/lmquant_quantization) has no effect",
        "ALGO_TYPE has no effect",
        "llm.LMQuant.eval.tasks has no effect",
        "llm.LMQuant.eval.max_seq_length has no effect",
        "llm.LMQuant.eval.evaluator has no effect",
        "llm.LMQuant.quant_type",
    ]
    assert all("EVALUATION" in line for line in loaded.warnings if ".eval." in line)
    assert loaded.resolved["llm"]["LMQuant"]["quant"]["smooth"]["yx"] == {
        "strategy": "GridSearch", "beta": " -2", "outputs_device": "cpu",
    }  # fmt: skip


def test_problems_name_the_dotted_key_and_its_line(tmp_path):
    text = EXAMPLE.replace("xw.alpha: 0.05", "xw.alpha: 5").replace("xw.beta", "xw.bta").replace('" -2"', '" -x"')
    found = _problems(text, tmp_path)
    assert set(found) == {
        "llm.LMQuant.quant.smooth.xw.alpha", "llm.LMQuant.quant.smooth.xw.bta", "llm.LMQuant.quant.smooth.yx.beta"
    }  # fmt: skip
    alpha, beta = found["llm.LMQuant.quant.smooth.xw.alpha"], found["llm.LMQuant.quant.smooth.xw.bta"]
    assert (alpha.line, alpha.value) == (_line("quant.smooth.xw.alpha"), 5)
    assert (beta.line, beta.nearest) == (_line("quant.smooth.xw.beta"), "beta")


def test_a_contradiction_with_the_preset_names_the_line_of_the_recipe(tmp_path):
    text = EXAMPLE.replace("quant.reorder.outputs_device: cpu", "quant.wgts.compute_dtype: sint8")
    ((key, problem),) = _problems(text, tmp_path).items()
    assert key == "llm.LMQuant.quant.wgts.compute_dtype"
    assert (problem.line, problem.value) == (_line("quant.reorder.outputs_device"), "sint8")


def test_one_key_with_two_values_names_both_lines(tmp_path):
    text = EXAMPLE.replace("    quant.reorder.outputs_device: cpu", "    quant: {smooth: {xw: {alpha: 0.3}}}")
    ((key, problem),) = _problems(text, tmp_path).items()
    assert key == "llm.LMQuant.quant.smooth.xw.alpha"
    assert (problem.line, problem.value) == (_line("quant.reorder.outputs_device"), 0.3)
    assert f"line {_line('quant.smooth.xw.alpha')}: 0.05" in problem.expected
    assert _load(text.replace("0.3", "0.05"), tmp_path).parameters.settings.smooth_xw.alpha == 0.05


def test_overrides_win_over_dotted_keys(tmp_path):
    loaded = _load(EXAMPLE, tmp_path, "llm.LMQuant.quant.smooth.xw.alpha=0.2", "llm.LMQuant.quant_type=g128")
    assert loaded.parameters.settings.smooth_xw.alpha == 0.2
    assert loaded.parameters.settings.weights.progressive
    (problem,) = _problems(EXAMPLE, tmp_path, "llm.LMQuant.quant.smooth.xw.alpha=2").values()
    assert (problem.file, problem.line, problem.value) == ("command line", None, "2")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("quant_typ: gchn", "quant_type"),
        ("quant.smoth.xw.alpha: 1", "smooth"),
        ("quant.wgts.dtyp: zint4", "dtype"),
        ("eval.evaluater: gptq", "evaluator"),
        ("calib.nsamples: 3", "llm.LMQuant.nsamples"),
        ("smooth.xw.alpha: 1", "llm.LMQuant.quant.smooth"),
    ],
)
def test_unknown_keys_are_sent_to_the_right_place(key, nearest, tmp_path):
    (problem,) = _problems(EXAMPLE.replace("quant.reorder.outputs_device: cpu", key), tmp_path).values()
    assert problem.nearest == nearest
    assert problem.line == _line("quant.reorder.outputs_device")
