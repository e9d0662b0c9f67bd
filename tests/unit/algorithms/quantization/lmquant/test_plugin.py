"""LMQuant from a model on disk to every format, read back, and computing as it will be served."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from algorithms.base import Artifact
from algorithms.formats.client import load as client_load
from algorithms.modeling.source import ModelSource
from algorithms.numerics.activations.hadamard import hadamard
from algorithms.quantization.lmquant.algorithm import refusal
from algorithms.quantization.lmquant.pipelines import cache_ranges
from tests.support.models import FAMILIES, confident, save_family
from tests.unit.algorithms.quantization.lmquant.recipes import algorithm
from tests.unit.algorithms.quantization.plugin_runs import (
    assert_resumes,
    base_logits,
    blocks,
    calibrate,
    export_folder,
    logits,
    run,
)

TUNING = {"block_tuning": {"max_epochs": 2, "batch_size": 2}}
ROTATED_ROWS = {"enable_rotation": True, "enable_smooth": False}
NO_WEIGHTS = {"wgts": {"dtype": None}}
EXPORTS = [
    *(("w4a8kv4_sym", family, 32, {}, ("compressed-tensors", "dense")) for family in FAMILIES),
    *(("g128", family, 128, {"size": 128}, ("qserve", "dense")) for family in FAMILIES),
    ("gchn", "qwen2", 64, {}, ("qserve", "dense")),
    ("gchn_kv8", "llama", 64, {}, ("qserve", "compressed-tensors", "dense")),
    ("sq_dynamic", "qwen3", 32, {}, ("compressed-tensors", "dense")),
    ("sq_static", "llama", 32, {}, ("compressed-tensors", "dense")),
    ("sq_dynamic", "gemma", 32, {"quant": ROTATED_ROWS}, ("qserve", "compressed-tensors")),
    ("awq", "mistral", 64, {"size": 32}, ("awq", "gptq", "dense")),
    ("gptq", "llama", 64, {"size": 32}, ("gptq", "awq", "dense")),
    ("g128", "llama", 32, {"quant": NO_WEIGHTS}, ("dense",)),
]  # fmt: skip


def _difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def _served(plugin, artifact, source, client=None):
    return logits(plugin.as_served(plugin.load(artifact), artifact, source, client))


@pytest.mark.parametrize(("preset", "family", "hidden", "changes", "exports"), EXPORTS)
def test_every_export_is_the_calibrated_model(tmp_path, preset, family, hidden, changes, exports):
    source = ModelSource(confident(save_family(tmp_path / "base", family, hidden=hidden, tied=family in ("qwen2", "gemma"))))
    plugin = algorithm(preset, exports, **changes)
    plugin.preflight(source, ["calibration", "conversion"])
    calibrated, converted = run(plugin, source, tmp_path / "out")
    ours = logits(plugin.load(calibrated))
    served = _served(plugin, calibrated, source)
    assert 0.0 < _difference(ours, base_logits(source)) < 0.8  # a text of a hundred tokens says little of what is 128 wide
    for name in exports:
        further = Artifact(kind=converted.kind, directory=export_folder(converted, plugin, name), digest="")
        found = logits(plugin.load(further))
        if name == "dense":  # decoded weights are rounded to float16
            assert _difference(found, ours) < 5e-3
        else:
            assert torch.equal(found, ours)
            assert torch.equal(_served(plugin, further, source), served)
        if name in ("compressed-tensors", "dense"):
            client = logits(client_load(name, further.directory))
            expected = _served(plugin, calibrated, source, name) if name == "compressed-tensors" else found
            assert _difference(client, expected) < 1e-4
            if name == "compressed-tensors":
                assert _difference(expected, ours) > 1e-3  # the client rounds inputs


def _rounded(inputs):
    """Inputs in 8 bits, by tokens."""
    steps = inputs.abs().amax(-1, keepdim=True) / 127.5
    return (inputs / steps).clamp(-128, 127).round() * steps


def _held_token(head):
    """Keys or values [d] of one head and token in 4 bits."""
    low, high = min(head.min().item(), 0.0), max(head.max().item(), 0.0)
    step = torch.tensor((high - low) / 15).half().item()
    zero = round(-low / step)
    return torch.tensor([(min(max(round(x / step + zero), 0), 15) - zero) * step for x in head.tolist()])


def _attention(module, query, key, value, attention_mask, scaling, **settings):
    """Attention of held keys and values, head by head."""
    held = [torch.stack([_held_token(row) for row in part.flatten(0, 2)]).view_as(part) for part in (key, value)]
    length, mixed = query.shape[2], torch.empty_like(query)
    future = torch.ones(length, length).triu(1).bool()
    for sequence in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = (part[sequence, head // module.num_key_value_groups] for part in held)
            scores = (query[sequence, head] @ keys.T * scaling).masked_fill(future, -math.inf)
            mixed[sequence, head] = scores.softmax(-1) @ values
    return mixed.transpose(1, 2), None


@pytest.mark.parametrize("preset", ["g128", "gchn", "w4a8kv4_sym"])
def test_what_is_scored_is_the_model_with_rounded_inputs_and_a_rounded_cache(tmp_path, preset, monkeypatch):
    source = ModelSource(confident(save_family(tmp_path / "base", "llama")), attn_implementation="eager")
    plugin = algorithm(preset)
    calibrated = calibrate(plugin, source, tmp_path / "out")
    plain = logits(plugin.load(calibrated))
    found = _served(plugin, calibrated, source)
    model = plugin.load(calibrated)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda module, args: (_rounded(args[0]), *args[1:]))
    model.config._attn_implementation = "eager"
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", _attention)
    expected = logits(model)
    assert _difference(found, plain) > 0.02
    # An input that lies on a tie may fall on either side of it.
    assert _difference(found, expected) < 0.1 * _difference(found, plain)


def test_a_static_cache_has_the_ranges_of_its_own_calibration(tmp_path):
    source = ModelSource(confident(save_family(tmp_path / "base", "llama")))
    plugin = algorithm("sq_static", ("compressed-tensors",))
    calibrated, converted = run(plugin, source, tmp_path / "job" / "tmp")
    ranges = cache_ranges(calibrated)
    assert ranges == cache_ranges(converted)
    assert len(set(ranges)) == 2
    found = _served(plugin, calibrated, source)
    assert torch.equal(_served(plugin, converted, source), found)
    # An older result in the job's folder says nothing about a calibration below it.
    stale = json.loads((converted.directory / "serving.json").read_text())
    stale["cache_ranges"] = [dict.fromkeys(entry, 1e-3) for entry in stale["cache_ranges"]]
    (tmp_path / "job" / "serving.json").write_text(json.dumps(stale))
    assert torch.equal(_served(plugin, calibrated, source), found)
    old = Artifact(kind=converted.kind, directory=tmp_path / "job", digest="")
    assert cache_ranges(old)[0] == (1e-3, 1e-3, 1e-3)
    model = plugin.load(calibrated)
    plugin.as_served(model, calibrated, source)
    for block, (query, key, value) in zip(model.model.layers, ranges, strict=True):
        assert block.self_attn.served.cache.ranges == (query, key, value)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("g128", {"quant": {"reorder": {"strategy": "GridSearch"}, "smooth": {"xw": {"strategy": "GridSearch", "beta": -2}}}}),
        ("gchn", {}),
        ("sq_static", {}),
        ("g128", {"quant": NO_WEIGHTS}),
        ("g128", TUNING),
        ("gchn", TUNING),
        ("w4a8kv4_sym", {"targets": "compressed_prefix"}),
    ],
)
def test_a_killed_calibration_resumes_at_its_block_with_the_same_result(tmp_path, preset, changes):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=3))
    plugin = algorithm(preset, **changes)
    assert_resumes(plugin, source, tmp_path)
    if preset == "sq_static":
        broken, whole = (Artifact(kind="lmquant-calibration", directory=tmp_path / n, digest="") for n in ("broken", "whole"))
        assert cache_ranges(broken) == cache_ranges(whole)


@pytest.mark.parametrize("preset", ["g128", "gchn", "w4a8kv4_sym"])
def test_learned_rounding_lowers_the_error_of_blocks_and_stays_in_the_format(tmp_path, preset):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=128))
    exports = ("compressed-tensors",) if preset == "w4a8kv4_sym" else ("qserve",)
    tuning = {"max_epochs": 4, "batch_size": 2, "rounding_step": 0.03}
    plugin = algorithm(preset, exports, size=128, block_tuning=tuning)
    calibrated, converted = run(plugin, source, tmp_path / "out")
    for report in blocks(calibrated, "tuning"):
        losses = report["validation_losses"]
        assert losses[report["best_epoch"]] == min(losses) < losses[0]
    assert torch.equal(logits(plugin.load(converted)), logits(plugin.load(calibrated)))


def test_bits_are_those_of_a_hand_count(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "gemma", tied=True))
    block = source.load_block(0)
    shapes = [tuple(block.get_submodule(name).weight.shape) for name in source.architecture.linears]
    weights, rows = 2 * sum(rows * columns for rows, columns in shapes), 2 * sum(rows for rows, _ in shapes)
    untied = {"added": 16 * source.vocab_size * 32, "parameters": weights}
    codes, groups = {"codes": 4 * weights}, weights / 16
    for preset, quant, expected in (
        ("g128", {}, {**codes, "scales": 16 * rows + 8 * groups, "zeros": 4 * groups, **untied}),
        ("gchn", {}, {**codes, "scales": 16 * rows, "zeros": 4 * rows, **untied}),
        ("w4a8kv4_sym", {}, {**codes, "scales": 16 * groups, **untied}),
        ("sq_dynamic", {}, {"codes": 8 * weights, "scales": 16 * rows, "parameters": weights}),
        ("gchn", NO_WEIGHTS, {"weights": 16 * weights, **untied}),
    ):
        plugin = algorithm(preset, ("dense",), quant=quant)
        calibrated, converted = run(plugin, source, tmp_path / f"{preset}{len(quant)}")
        assert dict(plugin.bits(calibrated)) == expected
        assert dict(plugin.bits(converted)) == expected


def test_a_tied_model_is_rotated_and_written_untied(tmp_path):
    source = ModelSource(confident(save_family(tmp_path / "base", "llama", tied=True)))
    plugin = algorithm("w4a8kv4_sym", ("compressed-tensors",))
    _, converted = run(plugin, source, tmp_path / "out")
    model = client_load("compressed-tensors", converted.directory)
    assert not model.config.tie_word_embeddings
    original = source.tensors(source.weight_files)
    embeddings, turn = original["model.embed_tokens.weight"], hadamard(32).float()
    torch.testing.assert_close(model.model.embed_tokens.weight, (embeddings @ turn).half().float(), atol=2e-3, rtol=0)
    head = embeddings * original["model.norm.weight"] @ turn
    torch.testing.assert_close(model.lm_head.weight, head.half().float(), atol=2e-3, rtol=0)


def test_without_an_export_the_first_format_that_holds_the_setting_is_written():
    found = {preset: algorithm(preset).exports for preset in ("gchn", "gchn_kv8", "w4a8kv4_sym", "sq_static", "gptq")}
    assert found == {
        "gchn": ("qserve",),
        "gchn_kv8": ("qserve",),
        "w4a8kv4_sym": ("compressed-tensors",),
        "sq_static": ("compressed-tensors",),
        "gptq": ("gptq",),
    }
    assert algorithm("g128").exports == ("dense",)  # groups of 16 are nobody's
    assert algorithm("g128", size=128).exports == ("qserve",)
    assert algorithm("gchn", quant=NO_WEIGHTS).exports == ("dense",)


@pytest.mark.parametrize(
    ("preset", "changes", "name", "said"),
    [
        ("gchn", {}, "compressed-tensors", "does not load packed weights with zero points"),
        ("g128", {}, "compressed-tensors", "scales in two levels"),
        ("g128", {}, "qserve", "groups of 128 with scales of sint8"),
        ("w4a8kv4_sym", {}, "qserve", "groups of 128 with scales of sint8"),
        ("w4a8kv4_sym", {}, "gptq", "no way to round activations to 8 bits"),
        ("w4a8kv4_sym", {"quant": {"ipts": {"dtype": "sint6"}}}, "compressed-tensors", "inputs of 6 bits"),
        ("gchn", {"quant": {"opts": {"dtype": "zint3"}}}, "qserve", "and not 3"),
        ("gchn", {"quant": {"enable_rotation": False}}, "qserve", "takes all norms for ones"),
        ("sq_dynamic", {}, "qserve", "takes all norms for ones"),
        ("gchn", {"quant": NO_WEIGHTS}, "awq", "quant.wgts.dtype is null"),
        ("gchn", {"quant": NO_WEIGHTS}, "qserve", "kernels for quantized weights"),
        ("gchn", {}, "qserve", r"columns of 32, unlike self_attn.k_proj \[16, 32\]"),
    ],
)
def test_exports_that_cannot_hold_a_setting_are_refused(tmp_path, preset, changes, name, said):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    plugin = algorithm(preset, (name, "dense"), **changes)
    with pytest.raises(ValueError, match=rf"EXPORT: {name}: .*{said}") as caught:
        plugin.preflight(source, ["calibration", "conversion"])
    assert "[dense] holds every setting" in str(caught.value) or "unlike" in said
    assert "EXPORT: dense" not in str(caught.value)
    plugin.preflight(source, ["calibration"])


def test_what_a_model_does_not_allow_is_refused_with_its_key(tmp_path):
    odd = ModelSource(save_family(tmp_path / "odd", "llama", hidden=32))
    odd.config.head_dim = 9
    with pytest.raises(ValueError, match=r"quant\.opts: a cache of 4 bits keeps 2 values in a byte, and a head has 9"):
        algorithm("gchn").preflight(odd, ["calibration"])
    algorithm("gchn_kv8").preflight(odd, ["calibration"])
    wide = ModelSource(save_family(tmp_path / "wide", "llama", hidden=23 * 8))
    with pytest.raises(ValueError, match=r"quant\.enable_rotation: .*order 184, and none can be constructed"):
        algorithm("gchn_kv8").preflight(wide, ["calibration"])
    algorithm("sq_dynamic").preflight(wide, ["calibration"])
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    for preset in ("g128", "w4a8kv4_sym"):
        with pytest.raises(
            ValueError, match=r"quant\.wgts\.group_shapes: groups of 24 .*mlp\.down_proj \[32, 64\].*; 16 divides"
        ):
            algorithm(preset, size=24).preflight(source, ["calibration"])
    with pytest.raises(ValueError, match=r"llm\.LMQuant\.block_tuning: learned rounding needs codes"):
        algorithm("gchn", quant=NO_WEIGHTS, **TUNING).preflight(source, ["calibration"])


def test_a_model_without_its_norms_is_refused(tmp_path, monkeypatch):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, hidden: hidden)
    with pytest.raises(
        ValueError, match=r"quant\.enable_rotation: .*input_layernorm computes something else than x / rms\(x\)"
    ):
        algorithm("gchn").preflight(source, ["calibration"])


def test_qserve_is_not_promised_where_it_is_not_written(tmp_path):
    source = ModelSource(save_family(tmp_path / "base", "llama", hidden=64))
    for exports in (("qserve",), ("dense", "qserve")):
        algorithm("gchn", exports, loads_with_qserve=True).preflight(source, ["conversion"])
    with pytest.raises(ValueError, match=r"loads_with_qserve: true asks for a format that EXPORT leaves out; add qserve"):
        algorithm("gchn", ("dense",), loads_with_qserve=True).preflight(source, ["conversion"])


@pytest.mark.parametrize(
    ("preset", "quant", "exports", "said", "unsaid"),
    [
        (
            "w4a8kv4_sym", {}, ("compressed-tensors",),
            ["--kv-cache-dtype int4_per_token_head", "linears in 8 bits", "in 4 bits (a scale for each token and head)"],
            "QServe",
        ),
        ("w4a8kv4_sym", {"opts": {"dtype": None}}, ("compressed-tensors",), ["vllm serve FOLDER (by"], "kv-cache-dtype"),
        ("w4a8kv4_sym", {"opts": {"dtype": "zint5"}}, ("compressed-tensors",), ["no cache of 5 bits"], "kv-cache-dtype"),
        ("gchn_kv8", {}, ("compressed-tensors",), ["int8_per_token_head", "queries, keys and values", "leaves"], "qserve"),
        ("sq_static", {}, ("compressed-tensors",), ["one scale for all tokens", "a scale for each token and head"], "qserve"),
        ("gchn", {}, ("qserve",), ["--precision w4a8kv4 --group-size -1; SGLang", "neither was run"], "vllm serve"),
        ("sq_dynamic", ROTATED_ROWS, ("qserve",), ["--precision w8a8kv8 --group-size -1 (by"], "SGLang"),
        (
            "gchn_kv8", {}, ("qserve", "compressed-tensors"),
            ["vllm serve FOLDER/exports/compressed-tensors --kv", "--quant-path FOLDER --ifb"], "exports/qserve",
        ),
        ("gchn", {"opts": {"dtype": "zint3", "skip_attn_k": True}}, ("dense",), ["values in 3 bits"], "vllm"),
    ],
)  # fmt: skip
def test_whoever_serves_it_is_told_how(preset, quant, exports, said, unsaid):
    notes = " ".join(algorithm(preset, exports, quant=quant).serving_notes(Path("FOLDER")))
    assert all(part in notes for part in said)
    assert unsaid not in notes


def test_nothing_but_weights_needs_no_words():
    assert algorithm("gptq").serving_notes(Path("FOLDER")) == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [("compressed-tensors", "set quant.wgts.dtype to sintN, or export gptq"), ("gguf", "set quant.wgts.dtype to sintN")],
)
def test_refusals_name_keys_that_lmquant_has(name, said):
    assert said in refusal(algorithm("gptq")._settings, name)
