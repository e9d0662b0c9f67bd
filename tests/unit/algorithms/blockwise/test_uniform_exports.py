import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from algorithms.base import Artifact
from algorithms.blockwise.stages import load_calibrated
from algorithms.blockwise.uniform_exports import FORMATS, Setting, check_exports, exporters, read_export
from algorithms.formats import uniform
from algorithms.formats.checkpoint import OUTSIDE, Calibrated
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.companions import copy_companions
from algorithms.modeling.on_demand import resident
from algorithms.modeling.source import ModelSource
from algorithms.numerics.uniform import UniformCodes
from tests.support.models import save_family, token_sequences
from tests.support.quantized_models import QuantizedModel, quantized_llama

SETTINGS = [
    Setting(bits=4, symmetric=True, group_size=32),
    Setting(bits=8, symmetric=True, group_size=64),
    Setting(bits=8, symmetric=True, group_size=-1),
    Setting(bits=3, symmetric=True, group_size=16),
    Setting(bits=2, symmetric=False, group_size=16),
    Setting(bits=4, symmetric=False, group_size=-1),
    Setting(bits=5, symmetric=True, group_size=8),
    Setting(bits=4, symmetric=True, group_size=16, has_column_groups=True),
    Setting(bits=3, symmetric=False, group_size=32, has_column_groups=True),
    Setting(bits=4, symmetric=False, group_size=32),
    Setting(bits=4, symmetric=True, group_size=64, activation_bits=8),
]


def _scattered(code: UniformCodes, seed: int) -> UniformCodes:
    columns = code.codes.shape[1]
    places = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    return UniformCodes(
        codes=code.codes,
        scales=code.scales,
        zeros=code.zeros,
        bits=code.bits,
        groups=(places // code.group_size).to(torch.int32),
    )


def _calibration(folder: Path, model: QuantizedModel, setting: Setting) -> tuple[Path, dict[str, torch.Tensor]]:
    """A calibration folder with the codes of a model, and the weights that they stand for."""
    source = model.source
    folder.mkdir()
    codes = dict(model.codes)
    if setting.has_column_groups:
        codes = {name: _scattered(code, seed) for seed, (name, code) in enumerate(codes.items())}
    outside = {name: model.kept[name].half() for name in source.outside_names()}
    save_file(outside, folder / OUTSIDE)
    copy_companions(source.directory, folder)
    (folder / "config.json").write_bytes((source.directory / "config.json").read_bytes())
    store = BlockStore(folder)
    for index in range(source.num_blocks):
        prefix = source.block_prefix(index)
        tensors = {name.removeprefix(prefix): tensor.half() for name, tensor in model.kept.items() if name.startswith(prefix)}
        for name, code in codes.items():
            if name.startswith(prefix):
                tensors |= uniform.pack(code, name.removeprefix(prefix))
        store.save(index, tensors, {})
    dense = {f"{name}.weight": code.dequantize() for name, code in codes.items()}
    return folder, model.kept | dense


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_format_holds_the_calibrated_weights(tmp_path, setting, tied):
    model = quantized_llama(
        tmp_path / "base", bits=setting.bits, group_size=setting.group_size, symmetric=setting.symmetric, tied=tied
    )
    folder, expected = _calibration(tmp_path / "calibration", model, setting)
    loaded = load_calibrated(folder, uniform.dense_state).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    written = [name for name in FORMATS if setting.refusal(name) is None]
    check_exports(setting, written, model.source)
    assert {"dense"} <= set(written)
    for name in written:
        out = tmp_path / name
        out.mkdir()
        exporters(setting)[name](Calibrated(folder), out)
        found = resident(read_export(out)).state_dict()
        for key, tensor in expected.items():
            # Decoded weights are rounded to float16; everything else holds the codes and scales themselves.
            rounded = tensor.half().float() if name == "dense" else tensor
            torch.testing.assert_close(found[key], rounded, atol=1e-8, rtol=1e-6, msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("setting", "formats", "first"),
    [
        (SETTINGS[0], FORMATS, "compressed-tensors"),
        (SETTINGS[2], ("compressed-tensors", "gptq", "auto-round", "gguf", "dense"), "compressed-tensors"),
        (SETTINGS[3], ("compressed-tensors", "gptq", "auto-round", "dense"), "compressed-tensors"),
        (SETTINGS[4], ("gptq", "auto-round", "dense"), "gptq"),
        (SETTINGS[5], ("gptq", "auto-round", "dense"), "gptq"),
        (SETTINGS[6], ("compressed-tensors", "dense"), "compressed-tensors"),
        (SETTINGS[7], ("gptq", "dense"), "gptq"),
        (Setting(bits=5, symmetric=False, group_size=16), ("dense",), "dense"),
        (Setting(bits=4, symmetric=False, group_size=32), ("gptq", "auto-round", "awq", "dense"), "gptq"),
        (
            Setting(bits=4, symmetric=True, group_size=32, activation_bits=8),
            ("compressed-tensors", "dense"),
            "compressed-tensors",
        ),
        (Setting(bits=4, symmetric=False, group_size=32, activation_bits=8), ("dense",), "dense"),
    ],
    ids=str,
)
def test_which_formats_hold_a_setting(setting, formats, first):
    assert tuple(name for name in FORMATS if setting.refusal(name) is None) == tuple(formats)
    assert setting.first_format() == first


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("compressed-tensors", Setting(bits=4, symmetric=False, group_size=32), "set sym: true"),
        ("compressed-tensors", Setting(bits=4, symmetric=True, group_size=32, has_column_groups=True), "static_groups: true"),
        ("gptq", Setting(bits=5, symmetric=True, group_size=32), "wbits is 5"),
        ("auto-round", Setting(bits=4, symmetric=True, group_size=32, has_column_groups=True), "static_groups: true"),
        ("auto-round", Setting(bits=6, symmetric=True, group_size=32), "wbits is 6"),
        ("awq", Setting(bits=3, symmetric=True, group_size=32), "wbits is 3"),
        ("awq", Setting(bits=4, symmetric=False, group_size=-1), "the whole row"),
        ("awq", Setting(bits=4, symmetric=True, group_size=32, has_column_groups=True), "static_groups: true"),
        ("awq", Setting(bits=4, symmetric=True, group_size=32, activation_bits=8), "activations to 8 bits"),
        ("gptq", Setting(bits=4, symmetric=True, group_size=32, activation_bits=8), "activations to 8 bits"),
        ("auto-round", Setting(bits=4, symmetric=True, group_size=32, activation_bits=8), "activations to 8 bits"),
        ("gguf", Setting(bits=4, symmetric=True, group_size=32, activation_bits=8), "activations to 8 bits"),
        ("gguf", Setting(bits=3, symmetric=True, group_size=32), "wbits is 3"),
        ("gguf", Setting(bits=4, symmetric=False, group_size=32), "set sym: true"),
        ("gguf", Setting(bits=4, symmetric=True, group_size=48), "groupsize: 32"),
        ("gguf", Setting(bits=4, symmetric=True, group_size=32, has_column_groups=True), "static_groups: true"),
    ],
)
def test_a_refusal_names_the_format_and_the_key(tmp_path, name, setting, said):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    with pytest.raises(ValueError, match=f"EXPORT: {name}: ") as caught:
        check_exports(setting, ("dense", name), source)
    assert said in str(caught.value)
    assert "dense:" not in str(caught.value)
    check_exports(setting, ("dense",), source)


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_each_version_of_awq_holds_codes_and_biases(tmp_path, version):
    setting = replace(SETTINGS[9], awq_version=version)
    model = quantized_llama(tmp_path / "base", bits=4, group_size=32, symmetric=False, attention_bias=True)
    folder, expected = _calibration(tmp_path / "calibration", model, setting)
    out = tmp_path / "out"
    out.mkdir()
    check_exports(setting, ("awq",), model.source)
    exporters(setting)["awq"](Calibrated(folder), out)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["version"] == version
    found = resident(read_export(out)).state_dict()
    assert sum(name.endswith("_proj.bias") for name in expected) == 8
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name].float(), tensor) for name, tensor in expected.items() if name.endswith(".bias"))


def test_awq_is_refused_for_shapes_that_its_version_cannot_hold(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=48))
    check_exports(SETTINGS[9], ("awq",), source)
    fast = replace(SETTINGS[9], awq_version="gemv_fast")
    with pytest.raises(ValueError, match=r"EXPORT: awq: AWQ's layout gemv_fast needs .*mlp\.gate_proj \[96, 48\]") as caught:
        check_exports(fast, ("awq",), source)
    assert "VERSION: GEMM has a place for them." in str(caught.value)
    with pytest.raises(ValueError, match=r"EXPORT: awq: AWQ's layout gemm needs rows .*self_attn\.k_proj \[20, 40\]") as caught:
        check_exports(SETTINGS[9], ("awq",), ModelSource(save_family(tmp_path / "odd", "llama", hidden=40)))
    assert "VERSION" not in str(caught.value)  # none would do


def test_a_refusal_speaks_the_recipe_s_words():
    words = (("wbits", "W_BIT"), ("groupsize", "Q_GROUP_SIZE"), ("sym: true", "ZERO_POINT: false"))
    setting = Setting(bits=4, symmetric=False, group_size=48, spelling=words)
    assert setting.refusal("awq").endswith("and Q_GROUP_SIZE is 48.")
    assert setting.refusal("compressed-tensors").endswith("set ZERO_POINT: false, or export gptq.")
    assert setting.refusal("gptq") is None
    assert replace(setting, bits=3, spelling=()).refusal("awq").endswith("and wbits is 3.")


def test_the_first_format_is_the_first_of_those_that_are_preferred():
    assert SETTINGS[9].first_format(("compressed-tensors", "awq", "gptq")) == "awq"
    assert SETTINGS[4].first_format(("awq", "dense", "gptq")) == "dense"


def test_transformers_computes_from_awq_what_the_codes_stand_for(tmp_path):
    """Through the converter of compressed-tensors, the one reader of AWQ's words that runs here."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    setting = SETTINGS[9]
    model = quantized_llama(tmp_path / "base", bits=4, group_size=32, symmetric=False)
    folder, _ = _calibration(tmp_path / "calibration", model, setting)
    out = tmp_path / "out"
    out.mkdir()
    exporters(setting)["awq"](Calibrated(folder), out)
    config = json.loads((out / "config.json").read_text())
    converter = converters.AutoAWQConverter.from_autoawq_config(config["quantization_config"])
    save_file(converter.process(load_file(out / "model.safetensors")), out / "model.safetensors", metadata={"format": "pt"})
    config["quantization_config"] = converter.update_config(None).to_dict() | {"dequantize": True}
    (out / "config.json").write_text(json.dumps(config))
    tokens = torch.cat(token_sequences(2, 12))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=tokens, use_cache=False).logits
    rounded = {f"{name}.weight": code.dequantize().half().float() for name, code in model.codes.items()}  # as it decodes
    ours = model.source.model_from(model.kept | rounded)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)


def test_activations_are_rounded_where_the_setting_says_so(tmp_path):
    configs = []
    model = quantized_llama(tmp_path / "base", bits=4, group_size=64)
    for setting in (SETTINGS[10], replace(SETTINGS[10], activation_bits=None)):
        folder, _ = _calibration(tmp_path / f"calibration-{setting.activation_bits}", model, setting)
        out = tmp_path / f"out-{setting.activation_bits}"
        out.mkdir()
        exporters(setting)["compressed-tensors"](Calibrated(folder), out)
        configs.append(json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"])
    assert configs[0]["input_activations"]["num_bits"] == 8
    assert "input_activations" not in configs[1]


def test_gguf_is_refused_for_families_that_it_is_not_written_for(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "qwen3", hidden=64))
    with pytest.raises(ValueError, match=r"EXPORT: gguf: .*qwen3"):
        check_exports(SETTINGS[0], ("compressed-tensors", "gguf"), source)


def test_a_missing_block_is_named(tmp_path):
    model = quantized_llama(tmp_path / "base", bits=4)
    folder, _ = _calibration(tmp_path / "calibration", model, SETTINGS[0])
    (folder / "1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"block 1 .*overwrite: true"):
        load_calibrated(Artifact(kind="x", directory=folder, digest="").directory, uniform.dense_state)
