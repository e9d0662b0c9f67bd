import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats.client import load as client_load
from algorithms.formats.own.packed_linear import PackedLinear
from algorithms.formats.spqr import packed as spqr
from algorithms.modeling.source import ModelSource
from algorithms.numerics.statistics import InputStatistics
from algorithms.quantization.spqr.algorithm import Spqr
from algorithms.quantization.spqr.calibration import fit
from algorithms.quantization.spqr.config import SpqrConfig
from algorithms.quantization.spqr.weight import as_uniform
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

TUNING = {"max_epochs": 3, "batch_size": 2}
NO_OUTLIERS = {"outlier_threshold": None, "qq_scale_bits": None, "qq_zero_bits": None}


def _algorithm(exports=(), **changes):
    return Spqr(SpqrConfig.model_validate({**TEXT, "wbits": 3, **changes}), exports)


def _weights(calibrated, index=0):
    tensors = load_file(calibrated.directory / f"{index}.safetensors")
    return {prefix: spqr.unpack(tensors, prefix) for prefix in spqr.packed_linears(list(tensors))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_exported_computes_the_calibrated_model(tmp_path, family, tied):
    source = ModelSource(save_family(tmp_path / "base", family, tied=tied))
    algorithm = _algorithm()
    assert algorithm.exports == ("dense", "spqr")
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours, base = logits(algorithm.load(calibrated)), base_logits(source)
    assert 0.0 < (ours - base).std() / base.std() < 0.5
    packed = spqr.load_packed(export_folder(converted, algorithm, "spqr"))
    linears = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 2 * len(source.architecture.linears)
    torch.testing.assert_close(logits(packed), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(client_load("dense", converted.directory)), ours, atol=5e-3, rtol=5e-3)
    reversed_ = _algorithm(exports=("spqr", "dense"))
    artifact = replace(converted, directory=export_folder(converted, algorithm, "spqr"))
    torch.testing.assert_close(logits(reversed_.load(artifact)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_tuning": TUNING},
        {"block_tuning": TUNING, "qq_scale_bits": None, "qq_zero_bits": None},
        {"targets": "compressed_prefix", "permutation_order": "spearman"},
        {"targets": "compressed_prefix", "true_sequential": True},
        {"targets": "compressed_prefix", "true_sequential": True, "block_tuning": TUNING},
        {"target_bits": 4.1, "permutation_order": "identity"},
        {"nearest": True, "outlier_threshold": None, "wbits": 2},
    ],
)
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    assert_resumes(_algorithm(**changes), source, tmp_path)


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (3.7, {}),
        (4.1, {}),
        (4.6, {}),
        *((4.1, changes) for changes in ({"permutation_order": "spearman"}, {"simplified_outliers": True}, {"nearest": True})),
    ],
)
def test_outliers_use_the_bits_that_were_asked_for_and_no_more(tmp_path, target, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    calibrated = calibrate(_algorithm(target_bits=target, **changes), source, tmp_path / "out")
    allowed = used = 0
    for index in range(2):
        for name, weight in _weights(calibrated, index).items():
            count, size = weight.outliers.values.numel(), weight.codes.numel()
            # Codes, statistics in 3 bits a group, four float16 numbers for 16 groups, 32 bits an outlier (section 3.625).
            bits = 3 + (3 + 3) / 16 + 4 * 16 / 256 + 32 * count / size
            assert bits <= target, name
            allowed, used = allowed + (target - 3.625) / 32 * size, used + count
    # At the smallest budget a matrix of 32 by 64 may have four, and a threshold that makes three.
    assert used >= (0.75 if target < 4 else 0.85) * allowed


@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.02])
def test_outliers_by_threshold_stay_within_their_limit(tmp_path, share):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    free, limited = (
        _weights(calibrate(_algorithm(outlier_threshold=0.1, **changes), source, tmp_path / name))
        for name, changes in (("free", {}), ("limited", {"max_outlier_share": share}))
    )
    assert sum(weight.outliers.values.numel() for weight in free.values()) > 100
    for name, weight in limited.items():
        most = share * weight.codes.numel()
        assert weight.outliers.values.numel() <= most, name
        if free[name].outliers.values.numel() <= most:
            assert torch.equal(weight.dequantize(), free[name].dequantize())
        else:
            # Of half a dozen outliers no threshold may give just as many: there, only the limit is promised.
            assert most < 10 or weight.outliers.values.numel() >= int(0.6 * most), name


def test_a_smaller_threshold_makes_more_outliers_and_a_smaller_error(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    counts, errors = [], []
    for threshold in (0.05, 0.2, 0.8, None):
        calibrated = calibrate(_algorithm(outlier_threshold=threshold), source, tmp_path / str(threshold))
        counts.append(sum(weight.outliers.values.numel() for weight in _weights(calibrated).values()))
        reports = blocks(calibrated, "linears")[0]
        errors.append(sum(report["relative_error"] for report in reports.values()))
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4
    assert counts[-1] == 0
    assert errors == sorted(errors)


def test_bits_are_those_of_the_stored_tensors(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    algorithm = _algorithm()
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    stored = parameters = 0
    for index in range(2):
        tensors = load_file(calibrated.directory / f"{index}.safetensors")
        inside = [name for name in tensors if "norm" not in name]
        stored += sum(8 * tensors[name].numel() * tensors[name].element_size() for name in inside)
        parameters += sum(weight.codes.numel() for weight in _weights(calibrated, index).values())
    bits = dict(algorithm.bits(calibrated))
    assert bits.pop("parameters") == parameters
    assert sum(bits.values()) == stored
    assert bits["codes"] == 3 * parameters
    assert dict(algorithm.bits(converted)) == bits | {"parameters": parameters}


@pytest.mark.parametrize(
    "changes",
    [
        {"perchannel": False, "outlier_threshold": None, "qq_scale_bits": None, "qq_zero_bits": None},
        {"perchannel": False, "simplified_outliers": True, "qq_scale_bits": None, "qq_zero_bits": None},
        {"simplified_outliers": True},
        {"nearest": True},
        {"qq_scale_bits": None},
        {"qq_zero_bits": None},
        {"round_zero": True},
        {"round_zero": 1, "qq_zero_bits": 2},
        {"sym": True},
        {"qq_zero_sym": True},
        {"groupsize": -1},
        {"groupsize": 1, "wbits": 2, "outlier_threshold": 0.5},
        {"qq_groupsize": 5},
        {"wbits": 8, "permutation_order": "identity"},
        {"wbits": 1},
        {"percdamp": 1.0, "refinements": 0},
    ],
)
def test_every_setting_makes_a_model_that_comes_back_and_is_close(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "qwen2"))
    algorithm = _algorithm(exports=("spqr", "dense"), **changes)
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours, base = logits(algorithm.load(calibrated)), base_logits(source)
    assert torch.isfinite(ours).all()
    most = {1: 1.0, 8: 0.1}.get(algorithm.config.bits, 0.6)
    assert 0 < (ours - base).std() / base.std() < most
    torch.testing.assert_close(logits(spqr.load_packed(converted.directory)), ours, atol=1e-5, rtol=1e-5)
    weight = _weights(calibrated)["mlp.down_proj"]
    if not algorithm.config.per_channel:
        assert weight.scales.decode().shape[0] == weight.zeros.decode().shape[0] == 1
    if algorithm.config.round_zero and algorithm.config.zero_bits != 2:
        assert torch.equal(weight.zeros.decode(), weight.zeros.decode().round())
    if algorithm.config.symmetric:
        assert torch.equal(weight.zeros.decode(), torch.full_like(weight.zeros.decode(), 4.0))


@pytest.mark.parametrize("changes", [{}, {"qq_scale_bits": None, "qq_zero_bits": None, "targets": "compressed_prefix"}])
def test_tuning_lowers_the_error_of_every_block(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    tuning = {"max_epochs": 6, "batch_size": 2, "rounding_step": 0.03}
    algorithm = _algorithm(wbits=2, block_tuning=tuning, **changes)
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    for report in blocks(calibrated, "tuning"):
        losses = report["validation_losses"]
        assert losses[report["best_epoch"]] == min(losses) < losses[0]
    packed = spqr.load_packed(export_folder(converted, algorithm, "spqr"))
    torch.testing.assert_close(logits(packed), logits(algorithm.load(calibrated)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tiles_come_back_close_to_the_model(tmp_path, family):
    source = ModelSource(save_family(tmp_path / "base", family))
    algorithm = _algorithm(exports=("spqr-tiles",))
    algorithm.preflight(source, ["calibration", "conversion"])
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    back, whole = algorithm.load(converted), algorithm.load(calibrated)
    # An outlier is stored as its distance from the code below it, and rounds once more.
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], weight, atol=1e-4, rtol=2**-10)
    torch.testing.assert_close(logits(back), logits(whole), atol=2e-3, rtol=2e-3)
    config = json.loads((converted.directory / "config.json").read_text())["quantization_config"]
    stored = load_file(converted.directory / "model.safetensors")
    assert all(stored[name.removesuffix(".shape")].numel() == count for name, count in config["shapes"].items())
    assert len(config["shapes"]) == 4 * 2 * len(source.architecture.linears)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("compressed-tensors", {"sym": True, "permutation_order": "identity"}),
        ("compressed-tensors", {"sym": True, "groupsize": -1}),
        ("compressed-tensors", {"sym": True, "permutation_order": "identity", "qq_zero_bits": 3}),
        ("gptq", {"sym": True}),
        ("gptq", {"sym": True, "qq_zero_bits": 3}),
        ("gptq", {"round_zero": True}),
        ("gptq", {"round_zero": True, "perchannel": False}),
    ],
)
@pytest.mark.parametrize("tuning", [None, TUNING])
def test_plain_codes_are_exported_to_plain_formats(tmp_path, name, changes, tuning):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    algorithm = _algorithm(exports=(name,), block_tuning=tuning, **(NO_OUTLIERS | {"wbits": 4, "groupsize": 32} | changes))
    algorithm.preflight(source, ["calibration", "conversion"])
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    ours = logits(algorithm.load(calibrated))
    torch.testing.assert_close(logits(algorithm.load(converted)), ours, atol=1e-5, rtol=1e-5)
    if name == "compressed-tensors":
        torch.testing.assert_close(logits(client_load(name, converted.directory)), ours, atol=2e-4, rtol=1e-3)
        return
    tensors = load_file(converted.directory / "model.safetensors")
    places = tensors["model.layers.0.mlp.down_proj.g_idx"]
    assert not torch.equal(places, torch.arange(128, dtype=torch.int32) // 32)
    assert places.bincount().tolist() == [32] * 4
    # Clients disagree on a zero of 0, which the layout stores as -1.
    assert all((as_uniform(weight).zeros >= 1).all() for weight in _weights(calibrated).values())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("spqr-tiles", {"wbits": 4}, "wbits: 3"),
        ("spqr-tiles", {"groupsize": 32}, "groupsize: 16"),
        ("spqr-tiles", {"qq_scale_bits": None}, "qq_scale_bits: 3"),
        ("spqr-tiles", {"qq_groupsize": 8}, "qq_groupsize: 16"),
        ("spqr-tiles", {"sym": True}, "sym: false"),
        ("spqr-tiles", {"round_zero": True}, "round_zero: false"),
        ("gptq", {}, "outlier_threshold: null"),
        ("gptq", {"outlier_threshold": None, "target_bits": 4.5}, "no place for outliers"),
        ("gptq", {"outlier_threshold": None}, "qq_scale_bits: null"),
        ("gptq", {"outlier_threshold": None, "qq_scale_bits": None}, "whole zeros"),
        ("gptq", {**NO_OUTLIERS, "sym": True, "wbits": 5}, "2, 3, 4 or 8"),
        ("compressed-tensors", {**NO_OUTLIERS, "round_zero": True, "permutation_order": "identity"}, "sym: true"),
        ("compressed-tensors", {**NO_OUTLIERS, "round_zero": True}, "permutation_order: identity"),
        ("compressed-tensors", {**NO_OUTLIERS, "sym": True}, "permutation_order: identity"),
        ("compressed-tensors", {**NO_OUTLIERS, "sym": True, "wbits": 1, "groupsize": -1}, "2 to 8 bits"),
    ],
)
def test_formats_that_cannot_hold_the_weights_are_refused(tmp_path, name, changes, reason):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    algorithm = _algorithm(exports=(name, "dense"), **changes)
    with pytest.raises(ValueError, match=f"EXPORT: {name}: ") as caught:
        algorithm.preflight(source, ["calibration", "conversion"])
    assert reason in str(caught.value)
    algorithm.preflight(source, ["calibration"])


def test_groups_that_do_not_divide_are_all_named(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match=r"llm\.SpQR\.groupsize: .*self_attn\.q_proj \[32, 32\].*mlp\.down_proj \[32, 64\]"):
        _algorithm(groupsize=24).preflight(source, ["calibration"])


@pytest.mark.parametrize("nearest", [False, True])
def test_outliers_are_the_same_in_any_units_of_the_inputs(nearest):
    matrix, hessian = problem(48, 64)
    config = SpqrConfig.model_validate({"wbits": 3, "nearest": nearest, "outlier_threshold": 0.2})
    values, vectors = torch.linalg.eigh(hessian.double())
    inputs = (vectors * values.clamp(min=0).sqrt()).T.float()
    found = []
    for unit in (1.0, 32.0):
        statistics = InputStatistics(64)
        statistics.update(unit * inputs)
        found.append(fit({"w": matrix}, statistics, config)["w"])
    assert found[0].outliers.values.numel() > 10
    assert torch.equal(found[0].outliers.columns, found[1].outliers.columns)
    torch.testing.assert_close(found[0].dequantize(), found[1].dequantize(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"qq_groupsize": 8}, {"permutation_order": "identity"}])
def test_linears_of_one_input_are_fitted_as_each_alone(changes):
    config = SpqrConfig.model_validate({"wbits": 3, **changes})
    matrix, _ = problem(80, 64)
    statistics = InputStatistics(64)
    statistics.update(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 3, 64))
    wanted = {"q": matrix[:48], "k": matrix[48:64], "v": matrix[64:]}
    together = fit(wanted, statistics, config)
    for name, part in wanted.items():
        alone = fit({name: part}, statistics, config)[name]
        assert torch.equal(together[name].outliers.columns, alone.outliers.columns)
        torch.testing.assert_close(together[name].dequantize(), alone.dequantize(), atol=1e-5, rtol=1e-5)


def test_rounding_to_nearest_compensates_nothing():
    matrix, _ = problem(32, 64)
    statistics = InputStatistics(64)
    statistics.update(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(64, 64))
    plain = {"wbits": 3, "permutation_order": "identity", **NO_OUTLIERS}
    nearest = fit({"w": matrix}, statistics, SpqrConfig.model_validate({**plain, "nearest": True}))["w"]
    scales, zeros = (part.decode().repeat_interleave(16, 1) for part in (nearest.scales, nearest.zeros))
    expected = scales * (torch.round(matrix / scales + zeros).clamp(0, 7) - zeros)
    torch.testing.assert_close(nearest.dequantize(), expected, atol=1e-6, rtol=1e-5)
    other = fit({"w": matrix}, statistics, SpqrConfig.model_validate(plain))["w"]
    assert (other.dequantize() - expected).abs().max() > 0.1


def test_where_nothing_matters_there_are_no_outliers(caplog):
    statistics = InputStatistics(64)
    statistics.update(torch.zeros(30, 64))
    config = SpqrConfig.model_validate({"wbits": 3})
    assert fit({"w": problem(48, 64)[0]}, statistics, config)["w"].outliers.values.numel() == 0
    alike = problem(1, 64)[0].expand(48, 64).contiguous()
    statistics.update(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    assert fit({"w": alike}, statistics, config)["w"].outliers.values.numel() == 0
    with caplog.at_level("WARNING"):
        fit({"w": problem(48, 64)[0]}, statistics, SpqrConfig.model_validate({"wbits": 1, "outlier_threshold": 0.01}))
    assert "w keeps" in caplog.text
    assert "target_bits" in caplog.text


def test_a_weight_beyond_float16_is_no_outlier_and_breaks_nothing():
    matrix, _ = problem(48, 64)
    matrix[5, 7] = 1e5
    statistics = InputStatistics(64)
    statistics.update(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    weight = fit({"w": matrix}, statistics, SpqrConfig.model_validate({"wbits": 3}))["w"]
    assert torch.isfinite(weight.dequantize()).all()
    assert (weight.outliers.values.abs() < 1e4).all()


@pytest.mark.parametrize("changes", [{"sym": True}, {"round_zero": True, "qq_zero_bits": None}])
def test_whole_zeros_are_stored_in_as_few_bits_as_they_need(changes):
    statistics = InputStatistics(64)
    statistics.update(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)))
    wanted = {"q": problem(80, 64)[0][:48], "k": problem(80, 64)[0][48:]}
    weights = fit(wanted, statistics, SpqrConfig.model_validate({"wbits": 3, **changes}))
    for name, weight in weights.items():
        zeros = weight.zeros.decode()
        assert torch.equal(zeros, zeros.round())
        assert weight.zeros.bits == (1 if "sym" in changes else 3)
        restored = spqr.unpack(spqr.pack(weight, "P"), "P")
        assert torch.equal(restored.dequantize(), weight.dequantize()), name
