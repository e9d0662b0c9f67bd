import json

import pytest
import torch

from algorithms.formats.client import load as client_load
from algorithms.modeling.source import ModelSource
from algorithms.numerics.uniform import Grid, RangeSearch, fit_grid
from algorithms.quantization.rtn.algorithm import Rtn
from algorithms.quantization.rtn.config import RtnConfig
from tests.support.models import FAMILIES, save_family
from tests.unit.algorithms.quantization.plugin_runs import (
    TEXT,
    assert_resumes,
    base_logits,
    blocks,
    calibrate,
    export_folder,
    logits,
    run,
)

TUNING = {"max_epochs": 3, "batch_size": 2}


def _algorithm(exports=(), **changes):
    return Rtn(RtnConfig.model_validate({**TEXT, "groupsize": 16, **changes}), exports)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_client_computes_the_calibrated_model(tmp_path, family, tied):
    source = ModelSource(save_family(tmp_path / "base", family, tied=tied))
    algorithm = _algorithm(exports=("dense", "compressed-tensors"))
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours, base = logits(algorithm.load(calibrated)), base_logits(source)
    assert 0.0 < (ours - base).std() / base.std() < 0.5
    compressed = client_load("compressed-tensors", export_folder(converted, algorithm, "compressed-tensors"))
    torch.testing.assert_close(logits(compressed), ours, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(logits(client_load("dense", converted.directory)), ours, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("changes", [{}, {"sym": False, "mse": False}, {"groupsize": -1, "wbits": 2}])
def test_every_weight_is_the_nearest_of_its_grid_and_no_text_is_asked_for(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = _algorithm(**changes)
    assert [spec.tokens for spec in algorithm.stages()] == [None, None]
    model = algorithm.load(calibrate(algorithm, source, tmp_path / "out"))
    config = algorithm.config
    for name in source.architecture.linears:
        matrix = source.load_block(1).get_submodule(name).weight.detach().float()
        found = model.get_submodule(f"{source.architecture.blocks}.1.{name}").weight
        size = matrix.shape[1] if config.group_size == -1 else config.group_size
        search = RangeSearch() if config.range_search else None
        expected_grid = Grid(bits=config.bits, symmetric=config.symmetric, search=search)
        for start in range(0, matrix.shape[1], size):
            group = matrix[:, start : start + size].T
            scales, zeros = fit_grid(group, torch.ones(size), expected_grid)
            grid = scales[:, None] * (torch.arange(1 << config.bits) - zeros[:, None])
            nearest = (group[:, :, None] - grid).abs().amin(-1)
            torch.testing.assert_close((group - found[:, start : start + size].T).abs(), nearest, atol=1e-6, rtol=0)


def test_eight_bits_are_next_to_nothing_lost(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "qwen2"))
    algorithm = _algorithm(wbits=8)
    ours = logits(algorithm.load(calibrate(algorithm, source, tmp_path / "out")))
    base = base_logits(source)
    assert (ours - base).std() / base.std() < 0.02


@pytest.mark.parametrize("changes", [{}, {"block_tuning": TUNING}, {"block_tuning": TUNING, "targets": "compressed_prefix"}])
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    assert_resumes(_algorithm(wbits=2, **changes), source, tmp_path)


def test_tuning_takes_text_and_lowers_the_error_of_every_block(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = _algorithm(wbits=2, block_tuning={"max_epochs": 6, "batch_size": 2, "rounding_step": 0.03})
    request = algorithm.stages()[0].tokens
    assert (request.num_samples, request.sequence_length, request.validation_samples) == (8, 16, 2)
    for report in blocks(calibrate(algorithm, source, tmp_path / "out"), "tuning"):
        losses = report["validation_losses"]
        assert losses[report["best_epoch"]] == min(losses) < losses[0]


def test_bits_are_those_of_a_hand_count(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = _algorithm(wbits=5, groupsize=-1, sym=False, exports=("dense",))
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    shapes = [tuple(source.load_block(0).get_submodule(name).weight.shape) for name in source.architecture.linears]
    weights, rows = 2 * sum(rows * columns for rows, columns in shapes), 2 * sum(rows for rows, _ in shapes)
    expected = {"codes": 5 * weights, "scales": 16 * rows, "zeros": 5 * rows, "parameters": weights}
    assert dict(algorithm.bits(calibrated)) == expected == dict(algorithm.bits(converted))


def test_what_it_refuses(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    with pytest.raises(ValueError, match=r"llm\.RTN\.groupsize: groups of 24 columns do not divide self_attn\.q_proj"):
        _algorithm(groupsize=24).preflight(source, ["calibration"])
    with pytest.raises(ValueError, match="EXPORT: gguf: GGUF's blocks are 32 columns wide"):
        _algorithm(exports=("gguf",)).preflight(source, ["conversion"])
    with pytest.raises(ValueError, match=r"EXPORT: compressed-tensors: .*set sym: true"):
        _algorithm(exports=("compressed-tensors",), sym=False).preflight(source, ["conversion"])
    _algorithm(exports=("gguf", "gptq"), groupsize=32).preflight(source, ["calibration", "conversion"])
    assert _algorithm(sym=False).exports == ("gptq",)


def test_settings_are_plain_values():
    for changes in ({}, {"block_tuning": TUNING}):
        settings = [dict(spec.settings) for spec in _algorithm(**changes).stages()]
        assert json.loads(json.dumps(settings)) == settings
