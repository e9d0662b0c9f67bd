import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats import uniform
from algorithms.formats.client import load as client_load
from algorithms.formats.client import no_client
from algorithms.modeling.source import ModelSource
from algorithms.quantization.awq.algorithm import Awq
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.rtn.algorithm import Rtn
from algorithms.quantization.rtn.config import RtnConfig
from tests.support.models import FAMILIES, save_family
from tests.unit.algorithms.quantization.awq.planted import plain_and_planted
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
LEADERS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of 8 outputs in the nibbles of one of AWQ's words


def _algorithm(exports=(), **changes):
    return Awq(AwqConfig.model_validate({**TEXT, "Q_GROUP_SIZE": 16, **changes}), exports)


def _codes(calibrated, source):
    """The calibration's own codes and scales, by the linear's full name."""
    found = {}
    for index in range(source.num_blocks):
        tensors = load_file(calibrated.directory / f"{index}.safetensors")
        for name in uniform.packed_linears(list(tensors)):
            found[source.block_prefix(index) + name] = uniform.unpack(tensors, name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_client_computes_the_calibrated_model(tmp_path, family, tied):
    source = ModelSource(save_family(tmp_path / "base", family, tied=tied))
    algorithm = _algorithm(exports=("compressed-tensors", "dense"), ZERO_POINT=False)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version", ["GEMM", "GEMV", "GEMV_FAST"])
def test_awq_s_own_format_holds_the_calibrated_model(tmp_path, family, version):
    source = ModelSource(save_family(tmp_path / "base", family, hidden=64))
    algorithm = _algorithm(Q_GROUP_SIZE=32, VERSION=version)
    algorithm.preflight(source, ["calibration", "conversion"])
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    assert torch.equal(logits(algorithm.load(converted)), logits(algorithm.load(calibrated)))
    settings = json.loads((converted.directory / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "awq"
    assert settings["version"] == version.lower()
    assert algorithm.stages()[1].settings == {"exports": ["awq"], "awq_version": version.lower()}


def _nibbles(words):
    """Codes [..., 8] of 32-bit words, the lowest nibble first."""
    return (words.numpy().view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15


def _read_awq(tensors, name):
    words = _nibbles(tensors[f"{name}.qweight"])  # [I, O/8, 8]
    codes = np.empty_like(words)
    codes[..., list(ORDER)] = words
    return codes.reshape(words.shape[0], -1).T


def _read_gptq(tensors, name):
    return _nibbles(tensors[f"{name}.qweight"].T.contiguous()).reshape(tensors[f"{name}.qweight"].shape[1], -1)


def _read_compressed(tensors, name):
    words = _nibbles(tensors[f"{name}.weight_packed"])
    return words.reshape(words.shape[0], -1)


_GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_GGUF_NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def _read_gguf(path, config):
    """Codes of every linear of a Q4_0 file by the gguf package's reader, by the linear's full name."""
    reader = pytest.importorskip("gguf").GGUFReader(path)
    stored, found = {tensor.name: tensor for tensor in reader.tensors}, {}
    for index in range(config["num_hidden_layers"]):
        for linear, short in _GGUF_NAMES.items():
            tensor = stored[f"blk.{index}.{short}.weight"]
            columns, rows = (int(size) for size in tensor.shape)
            packed = tensor.data.reshape(rows, columns // 32, 18)[..., 2:]
            codes = np.concatenate([packed & 15, packed >> 4], -1).reshape(rows, columns)
            heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(linear)
            if heads:  # ggml has the two halves that rotate together side by side
                codes = codes.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
            found[f"model.layers.{index}.{'self_attn' if 'attn' in short else 'mlp'}.{linear}"] = codes
    return found


def test_all_formats_of_one_calibration_hold_the_same_integers(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    formats = ("awq", "compressed-tensors", "gptq", "auto-round", "gguf", "dense")
    algorithm = _algorithm(exports=formats, ZERO_POINT=False, Q_GROUP_SIZE=32)
    algorithm.preflight(source, ["calibration", "conversion"])
    calibrated, converted = run(algorithm, source, tmp_path / "out")
    expected = _codes(calibrated, source)
    assert len(expected) == 14
    readers = {"awq": _read_awq, "compressed-tensors": _read_compressed, "gptq": _read_gptq, "auto-round": _read_gptq}
    for name, read in readers.items():
        tensors = load_file(export_folder(converted, algorithm, name) / "model.safetensors")
        for linear, codes in expected.items():
            difference = read(tensors, linear).astype(int) - codes.codes.numpy().astype(int)
            assert np.abs(difference).max() == 0, (name, linear)
    file = _read_gguf(export_folder(converted, algorithm, "gguf") / "model.gguf", source.raw_config())
    assert file.keys() == expected.keys()
    assert all(np.array_equal(file[linear], codes.codes.numpy()) for linear, codes in expected.items())
    assert all(len(np.unique(codes.codes.numpy())) == 16 for codes in expected.values())

    ours = logits(algorithm.load(calibrated))
    exact = [name for name in ("compressed-tensors", "gguf", "auto-round") if no_client(name, tmp_path) is None]
    for name in exact:
        tolerance = 2e-3 if name == "auto-round" else 1e-6  # its kernel multiplies in float16
        found = logits(client_load(name, export_folder(converted, algorithm, name)))
        torch.testing.assert_close(found, ours, atol=tolerance, rtol=tolerance)
    for name in ("awq", "gptq"):
        read = algorithm.load(replace(converted, directory=export_folder(converted, algorithm, name)))
        assert torch.equal(logits(read), ours)


def _distance(algorithm, source, folder):
    found = logits(algorithm.load(calibrate(algorithm, source, folder)))
    base = base_logits(source)
    return ((found - base).std() / base.std()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_loud_channels_ruin_rounding_and_not_awq(tmp_path, family):
    plain, planted = plain_and_planted(tmp_path, family, hidden=64)
    torch.testing.assert_close(base_logits(planted), base_logits(plain), atol=1e-4, rtol=1e-3)
    rounding = Rtn(RtnConfig.model_validate({"wbits": 4, "groupsize": 64, "sym": False}), ("dense",))
    scaling = _algorithm(gptq=False, Q_GROUP_SIZE=64, targets="compressed_prefix")
    sources = {"plain": plain, "planted": planted}
    rounded = [_distance(rounding, source, tmp_path / f"rtn-{name}") for name, source in sources.items()]
    scaled = [_distance(scaling, source, tmp_path / f"awq-{name}") for name, source in sources.items()]
    assert rounded[1] > 1.2 * rounded[0]
    assert scaled[1] < 1.15 * scaled[0]
    assert scaled[1] < 0.5 * rounded[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gptq": False},
        {"block_tuning": TUNING},
        {"objective": "block_output", "search_steps": 3},
        {"targets": "compressed_prefix", "gptq": False},
        {"targets": "compressed_prefix", "true_sequential": True, "block_tuning": TUNING, "duo_scaling": False},
        {"dtype": "float16", "ZERO_POINT": False, "Q_GROUP_SIZE": -1},
    ],
)
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    assert_resumes(_algorithm(W_BIT=2, **changes), source, tmp_path)
    for folder in ("whole", "broken"):
        reports = json.loads((tmp_path / folder / "calibration.json").read_text())["blocks"]
        assert [list(report["scaling"]) for report in reports] == [LEADERS] * 3


@pytest.mark.parametrize("targets", ["original", "compressed_prefix"])
def test_tuning_goes_on_from_what_was_scaled(tmp_path, targets):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    tuned = _algorithm(W_BIT=2, targets=targets, block_tuning={"max_epochs": 8, "batch_size": 2, "rounding_step": 0.03})
    calibrated = calibrate(tuned, source, tmp_path / "tuned")
    for report in blocks(calibrated, "tuning"):
        losses = report["validation_losses"]
        assert losses[report["best_epoch"]] == min(losses) < losses[0]
    for scaling in blocks(calibrated, "scaling"):
        assert list(scaling) == LEADERS
        assert all(0.0 < figures["error_share"] <= 1.0 for figures in scaling.values())
        assert {figures["factors"].split()[0] for figures in scaling.values()} <= {"duo", "inputs", "none"}


def test_bits_are_those_of_a_hand_count(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    block = source.load_block(0)
    shapes = [tuple(block.get_submodule(name).weight.shape) for name in source.architecture.linears]
    weights, rows = 2 * sum(height * width for height, width in shapes), 2 * sum(height for height, _ in shapes)
    for bits in (2, 3, 4, 8):
        expected = {"codes": bits * weights, "scales": weights, "zeros": bits * weights / 16, "parameters": weights}
        for folder, changes, zeros in (
            ("zeros", {}, True),
            ("symmetric", {"ZERO_POINT": False}, False),
            ("rows", {"Q_GROUP_SIZE": -1}, True),
        ):
            algorithm = _algorithm(W_BIT=bits, exports=("dense",), **changes)
            calibrated, converted = run(algorithm, source, tmp_path / f"{bits}{folder}")
            counted = {name: value for name, value in expected.items() if zeros or name != "zeros"}
            if folder == "rows":
                counted |= {"scales": 16 * rows, "zeros": bits * rows}
            assert dict(algorithm.bits(calibrated)) == dict(algorithm.bits(converted)) == counted


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"Q_GROUP_SIZE": 128}, "awq"),
        ({"Q_GROUP_SIZE": 32, "VERSION": "GEMV"}, "awq"),
        ({"Q_GROUP_SIZE": 128, "ZERO_POINT": False}, "compressed-tensors"),
        ({"W_BIT": 3}, "gptq"),
        ({"W_BIT": 3, "ZERO_POINT": False}, "compressed-tensors"),
        ({"W_BIT": 8, "Q_GROUP_SIZE": -1}, "gptq"),
        ({"Q_GROUP_SIZE": 16}, "gptq"),
    ],
)
def test_without_an_export_the_first_format_that_holds_the_codes_is_written(changes, first):
    assert _algorithm(**changes).exports == (first,)


def test_refusals_name_the_recipe_s_keys(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=48))
    with pytest.raises(ValueError, match=r"llm\.AutoAWQ\.Q_GROUP_SIZE: groups of 32 columns do not divide .*24 divides all"):
        _algorithm(Q_GROUP_SIZE=32).preflight(source, ["calibration"])

    def said(exports, **changes):
        with pytest.raises(ValueError, match="EXPORT: ") as caught:
            _algorithm(exports=exports, **changes).preflight(source, ["conversion"])
        return str(caught.value)

    assert "EXPORT: awq: AWQ's readers know codes of 4 bits alone, and W_BIT is 3." in said(("awq",), W_BIT=3)
    assert "and Q_GROUP_SIZE is 16." in said(("awq",))
    assert "set ZERO_POINT: false" in said(("compressed-tensors",))
    assert "set ZERO_POINT: false" in said(("gguf",), Q_GROUP_SIZE=32)
    assert "set Q_GROUP_SIZE: 32" in said(("gguf",), ZERO_POINT=False)
    fast = said(("awq",), Q_GROUP_SIZE=32, VERSION="GEMV_FAST")
    assert "layout gemv_fast needs" in fast
    assert "VERSION: GEMM has a place for them." in fast
    everything = said(("awq", "compressed-tensors", "gguf", "dense"), W_BIT=3).splitlines()
    assert [line.split(":")[1].strip() for line in everything[:-1]] == ["awq", "compressed-tensors", "gguf"]


def test_keys_that_cannot_change_the_result_stay_out_of_the_settings():
    plain = _algorithm().stages()[0].settings
    for changes in (
        {"VERSION": "GEMV"},
        {"offload_activations": False, "save_intermediate_results": True, "overwrite": True},
        {"true_sequential": True},
        {"val_size": 3, "nsamples": 20, "model_seqlen": 32},
        {"modules_to_not_convert": None},
    ):
        assert _algorithm(**changes).stages()[0].settings == plain
    for changes in (
        {"W_BIT": 3},
        {"ZERO_POINT": False},
        {"Q_GROUP_SIZE": 32},
        {"duo_scaling": False},
        {"apply_clip": False},
        {"objective": "block_output"},
        {"search_steps": 10},
        {"gptq": False},
        {"percdamp": 0.1},
        {"refinements": 2},
        {"targets": "compressed_prefix"},
        {"block_tuning": TUNING},
    ):
        assert _algorithm(**changes).stages()[0].settings != plain
    rounding = _algorithm(gptq=False).stages()[0].settings
    assert _algorithm(gptq=False, percdamp=0.1, refinements=3).stages()[0].settings == rounding
    json.dumps(dict(_algorithm(block_tuning=TUNING).stages()[0].settings))


def test_another_version_is_another_conversion_of_the_same_calibration():
    first, second = (_algorithm(Q_GROUP_SIZE=32, VERSION=version).stages() for version in ("GEMM", "GEMV"))
    assert first[0].settings == second[0].settings
    assert first[1].settings != second[1].settings
    without = [_algorithm(exports=("gptq",), VERSION=version).stages()[1].settings for version in ("GEMM", "GEMV")]
    assert without[0] == without[1] == {"exports": ["gptq"]}
