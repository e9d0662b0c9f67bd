"""ReALLM with a neural decoder for every matrix."""

from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from pydantic import ValidationError

from algorithms.formats.client import load as client_load
from algorithms.modeling.source import ModelSource
from algorithms.numerics.residuals.neural.budget import DecoderSizes
from algorithms.numerics.residuals.neural.codes import NeuralCodes
from algorithms.numerics.residuals.neural.target import LOSSES
from algorithms.numerics.residuals.neural.training import TrainingSettings
from algorithms.quantization.reallm import decoder_config
from algorithms.quantization.reallm.calibration import Fits
from algorithms.quantization.reallm.config import ReallmConfig
from algorithms.quantization.reallm.decoder_config import NervConfig
from algorithms.quantization.reallm.shapes import decoder_sizes, uniform_shape
from tests.support.models import save_family
from tests.unit.algorithms.quantization.plugin_runs import (
    assert_resumes,
    base_logits,
    calibrate,
    export_folder,
    logits,
    run,
)
from tests.unit.algorithms.quantization.reallm.reallm_runs import BLOCK_TUNING, reallm, weights

NERV = {"residual": "nerv", "num_bits": 8, "iterations": 1, "nerv": {"epochs": 6, "weight_bits": 6}}


def test_every_format_computes_the_model_that_was_made(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    algorithm = reallm(("dense", "reallm", "peft"), **NERV)
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours, base = logits(algorithm.load(calibrated)), base_logits(source)
    assert 0.0 < (ours - base).std() / base.std() < 0.9
    packed = client_load("reallm", export_folder(converted, algorithm, "reallm"))
    torch.testing.assert_close(logits(packed), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(client_load("dense", converted.directory)), ours, atol=5e-3, rtol=5e-3)
    pytest.importorskip("peft", reason="peft is not installed: its adapter cannot be loaded")
    adapted = client_load("peft", export_folder(converted, algorithm, "peft"))
    torch.testing.assert_close(logits(adapted), ours, atol=5e-3, rtol=5e-3)


def test_a_loaded_decoder_computes_once(tmp_path, monkeypatch):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    algorithm = reallm(("reallm",), **NERV)
    _, converted = run(algorithm, source, tmp_path / "out")
    calls, dequantize = [], NeuralCodes.dequantize
    monkeypatch.setattr(NeuralCodes, "dequantize", lambda self: calls.append(1) or dequantize(self))
    packed = client_load("reallm", converted.directory)
    loaded = len(calls)
    first, second = logits(packed), logits(packed)
    assert loaded == len(calls) == 7 * source.num_blocks
    assert torch.equal(first, second)
    linear = packed.get_submodule("model.layers.0.mlp.up_proj")
    assert set(dict(linear.named_buffers())) == set(linear.state_dict()), "what is decoded is not stored again"
    half = packed.to(torch.bfloat16)
    assert half.get_submodule("model.layers.0.mlp.up_proj").decoded().dtype == torch.bfloat16


def test_bits_of_residuals_are_those_asked_for(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    algorithm = reallm(**{**NERV, "nerv": {"epochs": 1, "bits": 6.5}})
    calibrated, _ = run(algorithm, source, tmp_path / "out")
    stored = parameters = 0
    for weight in weights(calibrated).values():
        assert isinstance(weight.residual, NeuralCodes)
        bits = sum(weight.residual.bits().values())
        rows, columns = weight.shape
        assert 6.5 - 64 / (rows * columns) <= bits / (rows * columns) <= 6.5
        stored, parameters = stored + bits, parameters + rows * columns
    said = dict(algorithm.bits(calibrated))
    assert said["parameters"] == 2 * parameters
    assert said["codes"] + said["decoder"] + said["scales"] + said["layout"] == 2 * stored


def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    assert_resumes(reallm(**{**NERV, "nerv": {"epochs": 2, "bits": 12.0}}), source, tmp_path)


def test_block_tuning_moves_scales_and_leaves_decoders(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64, blocks=1))
    algorithm = reallm(**NERV, block_tuning={**BLOCK_TUNING, "refit": False, "keep_best": False, "residual_step": 0.1})
    calibrated, tuned, _ = run(algorithm, source, tmp_path / "out")
    for name, weight in weights(calibrated).items():
        after = weights(tuned)[name].residual
        assert torch.equal(after.embedding, weight.residual.embedding)
        assert not torch.equal(after.movable()["scales"], weight.residual.movable()["scales"])


def test_a_survey_may_share_out_bits_among_decoders(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64, blocks=1))
    algorithm = reallm(residual="nerv", iterations=1, target_bits=6.0, nerv={"epochs": 1, "bits": 7.0})
    _, calibrated, _ = run(algorithm, source, tmp_path / "out")
    bits = dict(algorithm.bits(calibrated))
    average = sum(value for name, value in bits.items() if name != "parameters") / bits["parameters"]
    assert 5.9 < average <= 6.0


def test_trainings_are_shown(tmp_path):
    opened = []

    @contextmanager
    def progress(description, total):
        opened.append((description, total))
        yield lambda note: None

    config = ReallmConfig.model_validate({**NERV, "rank": 0, "nerv": {"epochs": 3}})
    fits = Fits(config, lambda index, name: uniform_shape(config), progress)
    fits._fit_one("mlp.up_proj", torch.randn(32, 32, generator=torch.Generator().manual_seed(0)), torch.eye(32))
    assert opened == [("block -1 mlp.up_proj decoder", 3)]


def test_bits_that_hold_no_decoder_are_refused_before_any_stage(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    said = r"llm\.ReALLM\.nerv: self_attn\.q_proj, a matrix of 32 x 32 at 0\.5 bits .* Give it more bits"
    with pytest.raises(ValueError, match=said):
        reallm(residual="nerv", nerv={"bits": 0.5}).preflight(source, ["calibration"])
    reallm(residual="nerv", nerv={"bits": 8.0}).preflight(source, ["calibration"])
    with pytest.raises(ValueError, match="narrowest decoder"):
        calibrate(reallm(residual="nerv", nerv={"bits": 0.5}), source, tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strides": []}, "a list of whole numbers of at least 2"),
        ({"strides": [2, 1]}, "from 2 to 16"),
        ({"strides": [2, 2], "patch_size": 10}, "a multiple of 4, the product of the strides"),
        ({"weight_bits": 9}, "from 2 to 8"),
        ({"loss": "Fusion6"}, "one of l2, diagonal, hessian"),
        ({"modelsize": 7.2}, "Extra inputs"),
    ],
)
def test_values_that_make_no_sense_are_refused(keys, said):
    with pytest.raises(ValidationError, match=said):
        ReallmConfig.model_validate({"residual": "nerv", "nerv": keys})


def test_keys_reach_the_coder_and_its_defaults_are_theirs():
    assert decoder_config.LOSSES == LOSSES
    asked = NervConfig()
    for kind in (DecoderSizes, TrainingSettings):
        for field in fields(kind):
            if field.name != "bits":
                assert getattr(asked, field.name) == field.default, field.name
    config = ReallmConfig.model_validate({"residual": "nerv", "num_bits": 3, "nerv": {"strides": [4, "2"], "patch_size": 64}})
    sizes = decoder_sizes(uniform_shape(config), config)
    assert (sizes.bits, sizes.strides, sizes.patch_size) == (3.0, (4, 2), 64)
    config = ReallmConfig.model_validate({"residual": "nerv", "num_bits": 3, "nerv": {"bits": 2.5}})
    assert decoder_sizes(uniform_shape(config), config).bits == 2.5


def test_decoders_shape_stages_only_where_there_are_any():
    def settings(**keys):
        return {spec.name: dict(spec.settings) for spec in reallm(**keys).stages()}

    assert settings(nerv={"epochs": 7}) == settings()
    assert settings(residual="nerv", nerv={"epochs": 7})["calibration"] != settings(residual="nerv")["calibration"]
    surveyed = settings(residual="nerv", target_bits=3.0)
    assert settings(residual="nerv", target_bits=3.0, nerv={"bits": 2.5}) == surveyed
    assert settings(residual="nerv", target_bits=3.0, nerv={"lr": 2.5})["survey"] != surveyed["survey"]


def test_keys_without_effect_are_named():
    def said(**keys):
        return [line.split(" has")[0] for line in ReallmConfig.model_validate(keys).warnings()]

    assert said(residual="nerv", nerv={"bits": 2.5}) == []
    assert said(residual="nerv", num_bits=3, nerv={"bits": 2.5}) == ["num_bits"]
    assert said(residual="nerv", target_bits=3.0, nerv={"bits": 2.5}) == ["nerv.bits"]
    assert said(residual="nf", nerv={"bits": 2.5}) == ["nerv"]
    assert said(residual="nerv", bucket=2) == ["bucket"]
