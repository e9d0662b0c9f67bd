import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats.client import load as client_load
from algorithms.formats.client import no_client
from algorithms.modeling.source import ModelSource
from algorithms.numerics.column_sweep import inverse_factor, quadratic_loss
from algorithms.numerics.statistics import InputStatistics
from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.calibration import fit
from algorithms.quantization.gptq.config import GptqConfig
from tests.support.matrices import problem
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

TUNING = {"max_epochs": 2, "batch_size": 2}


def _algorithm(exports=(), **changes):
    return Gptq(GptqConfig.model_validate({**TEXT, "groupsize": 16, **changes}), exports)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_client_computes_the_calibrated_model(tmp_path, family, tied):
    source = ModelSource(save_family(tmp_path / "base", family, tied=tied))
    algorithm = _algorithm(exports=("compressed-tensors", "dense"))
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours, base = logits(algorithm.load(calibrated)), base_logits(source)
    assert 0.0 < (ours - base).std() / base.std() < 0.5
    torch.testing.assert_close(logits(algorithm.load(converted)), ours, atol=1e-5, rtol=1e-5)
    compressed = client_load("compressed-tensors", converted.directory)
    packed = [name for name, module in compressed.named_modules() if hasattr(module, "quantization_scheme")]
    assert len(packed) == 2 * len(source.architecture.linears)
    torch.testing.assert_close(logits(compressed), ours, atol=2e-4, rtol=1e-3)
    dense = client_load("dense", export_folder(converted, algorithm, "dense"))
    torch.testing.assert_close(logits(dense), ours, atol=5e-3, rtol=5e-3)
    settings = json.loads((converted.directory / "exports" / "dense" / "config.json").read_text())
    assert "quantization_config" not in settings


@pytest.mark.skipif(no_client("auto-round", None) is not None, reason="auto-round is not installed")
@pytest.mark.parametrize("symmetric", [False, True])
def test_auto_round_reads_the_codes(tmp_path, symmetric):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    algorithm = _algorithm(exports=("auto-round",), groupsize=32, sym=symmetric)
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours = logits(algorithm.load(calibrated))
    torch.testing.assert_close(logits(client_load("auto-round", converted.directory)), ours, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_tuning": TUNING},
        {"targets": "compressed_prefix"},
        {"targets": "compressed_prefix", "true_sequential": True},
        {"targets": "compressed_prefix", "block_tuning": TUNING},
        {"targets": "compressed_prefix", "true_sequential": True, "block_tuning": TUNING},
        {"val_size": 0, "reference_samples": 3},
        {"act_order": True, "static_groups": False, "sym": False, "block_tuning": TUNING},
        {"dtype": "float16"},
    ],
)
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    assert_resumes(_algorithm(wbits=2, **changes), source, tmp_path)


@pytest.mark.parametrize("targets", ["original", "compressed_prefix"])
def test_tuning_lowers_the_error_of_every_block_and_of_the_model(tmp_path, targets):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    plain = _algorithm(wbits=2, targets=targets)
    tuned = _algorithm(wbits=2, targets=targets, block_tuning={"max_epochs": 8, "batch_size": 2, "rounding_step": 0.03})
    before, after = calibrate(plain, source, tmp_path / "plain"), calibrate(tuned, source, tmp_path / "tuned")
    for report in blocks(after, "tuning"):
        losses = report["validation_losses"]
        assert losses[report["best_epoch"]] == min(losses) < losses[0]
    codes = [load_file(artifact.directory / "1.safetensors")["mlp.up_proj.codes"] for artifact in (before, after)]
    assert not torch.equal(*codes)


def test_bits_are_those_of_a_hand_count(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    block = source.load_block(0)
    shapes = [tuple(block.get_submodule(name).weight.shape) for name in source.architecture.linears]
    weights = 2 * sum(rows * columns for rows, columns in shapes)
    expected = {"codes": 3 * weights, "scales": 16 * weights / 16, "parameters": weights}
    zeros = {"zeros": 3 * weights / 16}
    groups = {"groups": 2 * 32 * sum(columns for _, columns in shapes)}
    for changes, more in (
        ({}, {}),
        ({"sym": False}, zeros),
        ({"sym": False, "static_groups": False}, zeros | groups),
        ({"block_tuning": TUNING}, {}),
    ):
        algorithm = _algorithm(wbits=3, exports=("dense",), **changes)
        calibrated, converted = run(algorithm, source, tmp_path / str(len(changes)) / "-".join(changes))
        assert dict(algorithm.bits(calibrated)) == expected | more
        assert dict(algorithm.bits(converted)) == expected | more


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sym": False},
        {"act_order": False, "groupsize": -1},
        {"static_groups": False},
        {"refinements": 0, "mse": False},
    ],
)
def test_linears_of_one_input_are_fitted_as_each_alone(changes):
    config = GptqConfig.model_validate({"wbits": 3, "groupsize": 16, "percdamp": 0.02, **changes})
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    statistics = InputStatistics(48)
    statistics.update(inputs)
    wanted = {name: torch.randn(rows, 48, generator=generator) for name, rows in (("q", 24), ("k", 8))}
    together = fit(wanted, statistics, config)
    for name, matrix in wanted.items():
        alone = fit({name: matrix}, statistics, config)[name]
        torch.testing.assert_close(together[name].dequantize(), alone.dequantize(), atol=1e-6, rtol=1e-5)


def test_each_of_its_means_lowers_the_error():
    matrix, hessian = problem(32, 64, seed=1)
    statistics = InputStatistics(64)
    values, vectors = torch.linalg.eigh(hessian.double())
    statistics.update((vectors * values.clamp(min=0).sqrt()).T.float() * 8)  # sixty-four tokens whose mean x x^T is H
    hessian = statistics.hessian()

    def loss(**changes):
        config = GptqConfig.model_validate({"wbits": 3, "groupsize": 16, "sym": False, **changes})
        weight = fit({"w": matrix}, statistics, config)["w"].dequantize()
        return quadratic_loss(matrix.T, weight.T, hessian)

    plain = loss(mse=False, refinements=0, act_order=False)
    assert loss(mse=False, refinements=0) < plain
    assert loss(mse=False, refinements=2, act_order=False) < plain
    assert loss() < 0.9 * plain
    assert inverse_factor(hessian, 0.01).damping == 0.01


def test_without_an_export_the_first_format_that_holds_the_codes_is_written():
    assert _algorithm().exports == ("compressed-tensors",)
    assert _algorithm(sym=False).exports == ("gptq",)
    assert _algorithm(sym=False, wbits=5).exports == ("dense",)
    assert _algorithm(static_groups=False).exports == ("gptq",)
    assert _algorithm(static_groups=False, groupsize=-1).exports == ("compressed-tensors",)


def test_exports_that_cannot_hold_the_codes_are_all_refused(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "qwen2", hidden=64))
    algorithm = _algorithm(exports=("compressed-tensors", "gguf", "auto-round", "gptq", "dense"), static_groups=False)
    with pytest.raises(ValueError, match=r"(?s)EXPORT: compressed-tensors: .*EXPORT: gguf: .*EXPORT: auto-round: ") as caught:
        algorithm.preflight(source, ["calibration", "conversion"])
    assert "gptq:" not in str(caught.value)
    algorithm.preflight(source, ["calibration"])
    with pytest.raises(ValueError, match="this one is qwen2"):
        _algorithm(exports=("gguf",), groupsize=32).preflight(source, ["conversion"])


@pytest.mark.parametrize("name", ["gptq", "auto-round"])
def test_matrices_that_the_layout_cannot_hold_are_refused_before_they_are_calibrated(tmp_path, name):
    narrow, wide = (ModelSource(save_family(tmp_path / str(size), "llama", hidden=size)) for size in (32, 64))
    with pytest.raises(ValueError, match=r"unlike self_attn\.k_proj \[16, 32\], self_attn\.v_proj \[16, 32\]\."):
        _algorithm(exports=(name,)).preflight(narrow, ["calibration", "conversion"])
    _algorithm(exports=(name,)).preflight(wide, ["calibration", "conversion"])


def test_groups_that_do_not_divide_are_all_named(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match=r"llm\.GPTQ\.groupsize: .*self_attn\.q_proj \[32, 32\].*mlp\.down_proj \[32, 64\]"):
        _algorithm(groupsize=24).preflight(source, ["calibration"])
    _algorithm(groupsize=24).preflight(source, ["conversion"])
    _algorithm(groupsize=-1).preflight(source, ["calibration"])


def test_keys_that_cannot_change_the_result_stay_out_of_the_settings():
    plain = _algorithm().stages()[0].settings
    for changes in (
        {"offload_activations": False, "save_intermediate_results": True, "overwrite": True},
        {"true_sequential": True},
        {"val_size": 3, "nsamples": 20, "model_seqlen": 32},
    ):
        assert _algorithm(**changes).stages()[0].settings == plain
    for changes in ({"wbits": 3}, {"percdamp": 0.1}, {"refinements": 2}, {"targets": "compressed_prefix"}, {"mse": False}):
        assert _algorithm(**changes).stages()[0].settings != plain
    tuned = _algorithm(block_tuning=TUNING).stages()[0].settings
    assert tuned != plain
    memory = {"micro_batch_size": 1, "use_checkpointing": True}
    assert _algorithm(block_tuning=TUNING | memory).stages()[0].settings == tuned
    assert _algorithm(block_tuning=TUNING | {"max_epochs": 3}).stages()[0].settings != tuned
    prefix = {"targets": "compressed_prefix"}
    sequential = _algorithm(**prefix, true_sequential=True).stages()[0].settings
    assert sequential != _algorithm(**prefix).stages()[0].settings


def test_references_count_only_where_the_original_is_followed_in_part():
    plain = _algorithm().stages()[0].settings
    assert _algorithm(reference_samples=3).stages()[0].settings != plain
    for changes in ({"block_tuning": TUNING}, {"targets": "compressed_prefix"}):
        settings = [_algorithm(**changes, **more).stages()[0].settings for more in ({}, {"reference_samples": 3})]
        assert settings[0] == settings[1]


def test_settings_are_plain_values():
    for spec in _algorithm(block_tuning=TUNING).stages():
        json.dumps(dict(spec.settings))
        assert dataclasses.is_dataclass(spec)


def test_biases_of_what_writes_to_the_residual_stream_count_once(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", attention_bias=True, mlp_bias=True))
    algorithm = _algorithm(wbits=8)
    calibrated, _ = run(algorithm, source, tmp_path / "out")
    model = algorithm.load(calibrated)
    assert model.model.layers[0].mlp.down_proj.bias.std() > 0.1
    base = base_logits(source)
    assert (logits(model) - base).std() < 0.005 * base.std()
