import json
import re

import pytest
import torch
from safetensors.torch import load_file

from algorithms.formats.client import load as client_load
from algorithms.modeling.source import ModelSource
from algorithms.numerics.pruning.selection import STRUCTURES
from tests.support.models import FAMILIES, save_family
from tests.unit.algorithms.pruning.flap.pruner_runs import TOKENS, half_constant, kept, left, mean_outputs, pruner
from tests.unit.algorithms.quantization.plugin_runs import (
    KilledError,
    base_logits,
    blocks,
    calibrate,
    export_folder,
    killed_at,
    logits,
    run,
    run_stage,
)


def _linear_parameters(source):
    block = source.load_block(0)
    return source.num_blocks * sum(block.get_submodule(name).weight.numel() for name in source.architecture.linears)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_structure_meets_the_ratio_on_every_family_and_both_clients_read_it(tmp_path, family, structure):
    source = ModelSource(save_family(tmp_path / "base", family, blocks=3, tied=family == "gemma"))
    algorithm = pruner(("padded", "ragged"), structure=structure, pruning_ratio=0.3, pad_neurons_to=8)
    ranking, pruned, converted = run(algorithm, source, tmp_path / "out")
    total = _linear_parameters(source)
    assert abs(left(pruned) - 0.7 * total) <= 0.005 * total
    widths = {(len(groups), len(neurons)) for groups, neurons in kept(ranking)}
    assert len(widths) == 1 or structure.startswith("AL")
    ours, base = logits(algorithm.load(pruned)), base_logits(source)
    assert 0.0 < (ours - base).std() < base.std()
    torch.testing.assert_close(logits(algorithm.load(converted)), ours, atol=1e-4, rtol=1e-4)
    for name in ("padded", "ragged"):
        folder = export_folder(converted, algorithm, name)
        torch.testing.assert_close(logits(client_load(name, folder)), ours, atol=1e-4, rtol=1e-4)
    assert json.loads((converted.directory / "config.json").read_text())["intermediate_size"] % 8 == 0


@pytest.mark.parametrize("metric", ["OBS", "IFV", "WIFV", "WIFN"])
@pytest.mark.parametrize("compensation", ["least_squares", "bias", "none"])
def test_every_metric_with_every_compensation(tmp_path, metric, compensation):
    source = ModelSource(save_family(tmp_path / "base", "qwen2", blocks=3))
    algorithm = pruner(metrics=metric, compensation=compensation)
    _, pruned, _ = run(algorithm, source, tmp_path / "out")
    total = _linear_parameters(source)
    assert abs(left(pruned) - 0.8 * total) <= 0.005 * total
    has_bias = "self_attn.o_proj.bias" in load_file(pruned.directory / "2.safetensors")
    assert has_bias == ((compensation != "none" and len(kept_of(pruned, 2)) < 2) or compensation == "least_squares")
    base = base_logits(source)
    assert (logits(algorithm.load(pruned)) - base).std() < base.std()


def kept_of(pruned, block):
    """Groups of heads that stay of a block."""
    return json.loads((pruned.directory / "calibration.json").read_text())["ranking"]["blocks"][block]["groups"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_ratio_of_zero_changes_nothing_but_rounds(tmp_path, family, structure):
    source = ModelSource(save_family(tmp_path / "base", family))
    algorithm = pruner(("padded", "ragged"), structure=structure, pruning_ratio=0.0, remove_heads=2)
    _, _, converted = run(algorithm, source, tmp_path / "out")
    original = source.tensors(list(source.weight_files), torch.float32)
    for name in ("padded", "ragged"):
        stored = load_file(export_folder(converted, algorithm, name) / "model.safetensors")
        assert stored.keys() == original.keys()
        assert all(torch.equal(stored[key], original[key].half()) for key in stored)
    settings = json.loads((converted.directory / "config.json").read_text())
    same = ("model_type", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert {key: settings[key] for key in same} == {key: source.raw_config()[key] for key in same}


@pytest.mark.parametrize("compensation", ["least_squares", "bias"])
def test_blocks_before_the_first_to_prune_stay_and_the_ratio_is_that_of_the_others(tmp_path, compensation):
    source = ModelSource(save_family(tmp_path / "base", "llama", blocks=4))
    algorithm = pruner(start_pruning_layer_idx=2, pruning_ratio=0.4, compensation=compensation)
    ranking, pruned, _ = run(algorithm, source, tmp_path / "out")
    for index in (0, 1):
        stored, block = load_file(pruned.directory / f"{index}.safetensors"), source.load_block(index).state_dict()
        assert stored.keys() == block.keys()
        assert all(torch.equal(stored[name], block[name].half()) for name in stored)
    assert [len(neurons) for _, neurons in kept(ranking)][:2] == [64, 64]
    total = _linear_parameters(source)
    assert abs(left(pruned) - (1 - 0.4 / 2) * total) <= 0.005 * total


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("compensation", ["least_squares", "bias"])
def test_what_is_constant_goes_without_any_change(tmp_path, structure, compensation):
    source = half_constant(tmp_path / "base")
    algorithm = pruner(structure=structure, pruning_ratio=0.5, compensation=compensation)
    ranking, pruned, converted = run(algorithm, source, tmp_path / "out")
    assert kept(ranking) == [([0], list(range(1, 64, 2)))] * 2
    base = base_logits(source)
    for artifact in (pruned, converted):
        assert (logits(algorithm.load(artifact)) - base).abs().max() < 2e-3 * base.std()
    without = pruner(structure="UL-UM", metrics="IFV", pruning_ratio=0.5, compensation="none")
    same, uncompensated, _ = run(without, source, tmp_path / "without")
    assert kept(same) == kept(ranking)
    assert (logits(without.load(uncompensated)) - base).abs().max() > 0.1 * base.std()


@pytest.mark.parametrize(
    ("linear", "keys"),
    [
        ("self_attn.o_proj", {"structure": "UL-UM", "pruning_ratio": 0.5}),
        ("mlp.down_proj", {"structure": "UL-MM", "remove_heads": 0, "pruning_ratio": 0.3}),
    ],
)
@pytest.mark.parametrize("metric", ["WIFV", "OBS"])
def test_a_bias_makes_the_mean_output_exact(tmp_path, linear, keys, metric):
    source, name = half_constant(tmp_path / "base"), f"model.layers.0.{linear}"
    whole = source.model_from(source.tensors(list(source.weight_files), torch.float32))
    means = {}
    for compensation in ("bias", "none"):
        algorithm = pruner(metrics=metric, compensation=compensation, **keys)
        _, pruned, _ = run(algorithm, source, tmp_path / compensation)
        means[compensation] = mean_outputs(algorithm.load(pruned), name)
    expected = mean_outputs(whole, name)
    torch.testing.assert_close(means["bias"], expected, atol=1e-3 * expected.std().item(), rtol=1e-3)
    assert (means["none"] - expected).abs().max() > 0.02 * expected.std()


def test_a_refit_is_nearer_to_the_original_than_a_bias_and_that_than_nothing(tmp_path):
    source, errors = half_constant(tmp_path / "base"), []
    whole = source.model_from(source.tensors(list(source.weight_files), torch.float32))
    for compensation in ("least_squares", "bias", "none"):
        algorithm = pruner(structure="UL-UM", pruning_ratio=0.6, compensation=compensation)
        model = algorithm.load(run(algorithm, source, tmp_path / compensation)[1])
        with torch.no_grad():
            errors.append((model(TOKENS).logits - whole(TOKENS).logits).std().item())
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1] < errors[2]


@pytest.mark.parametrize("family", ["qwen3", "gemma"])
def test_without_a_place_for_a_bias_the_refit_has_none(tmp_path, family):
    source = ModelSource(save_family(tmp_path / "base", family))
    for exports, biased in ((("padded",), False), (("ragged",), True)):
        algorithm = pruner(exports, structure="UL-UM", pruning_ratio=0.5)
        _, pruned, _ = run(algorithm, source, tmp_path / exports[0])
        stored = load_file(pruned.directory / "0.safetensors")
        assert "self_attn.o_proj.bias" in stored
        assert ("mlp.down_proj.bias" in stored) == biased


def test_a_killed_pruning_goes_on_where_it_stopped(tmp_path):
    source, algorithm = ModelSource(save_family(tmp_path / "base", "llama", blocks=3)), pruner()
    ranking, whole, _ = run(algorithm, source, tmp_path / "whole")
    broken, times = tmp_path / "broken", {}
    for block in (1, 2):
        with pytest.raises(KilledError):
            run_stage(algorithm, source, broken, "pruning", ranking, killed_at(block))
        assert not (broken / f"{block}.safetensors").exists()
        times[block - 1] = (broken / f"{block - 1}.safetensors").stat().st_mtime_ns
    resumed = run_stage(algorithm, source, broken, "pruning", ranking)
    assert {index: (broken / f"{index}.safetensors").stat().st_mtime_ns for index in times} == times
    for index in range(3):
        expected, found = (load_file(at / f"{index}.safetensors") for at in (whole.directory, broken))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert blocks(resumed, "output_error") == blocks(whole, "output_error")
    assert algorithm.bits(resumed) == algorithm.bits(whole)


def test_a_killed_ranking_starts_again(tmp_path):
    source, algorithm = ModelSource(save_family(tmp_path / "base", "llama")), pruner()
    with pytest.raises(KilledError):
        calibrate(algorithm, source, tmp_path / "broken", killed_at(1))
    again, whole = (calibrate(algorithm, source, tmp_path / name) for name in ("broken", "whole"))
    assert again.digest == whole.digest


def test_bits_by_hand(tmp_path):
    source, algorithm = ModelSource(save_family(tmp_path / "base", "llama")), pruner(structure="UL-UM", pruning_ratio=0.5)
    _, pruned, converted = run(algorithm, source, tmp_path / "out")
    # A block: q and o 32 * 32, k and v 16 * 32, three times 64 * 32 around the neurons: 9216 weights. Half of it: one of two
    # groups, 32 of 64 neurons. Two linears of 32 outputs have a new bias.
    expected = {"weights": 16.0 * 2 * 4608, "biases": 16.0 * 2 * 64, "parameters": 2.0 * 9216}
    assert algorithm.bits(pruned) == algorithm.bits(converted) == expected
    facts = json.loads((converted.directory / "prune_config.json").read_text())
    # Written as a Llama whose flags give all seven linears a bias: 32 and 32 and twice 8, then 32 and twice 32 a block, less
    # than what q, k, v lose with a group.
    lost = facts["sizes"]["original"]["parameters"] - facts["sizes"]["padded"]["parameters"]
    assert lost == 2 * (4608 - (16 + 8 + 8 + 32) - (32 + 32 + 32))
    assert facts["compensation"] == "least_squares"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"start_pruning_layer_idx": 2},
            "start_pruning_layer_idx: 2 leaves nothing to prune; .* of this model's is 1",
        ),
        ({"gqa_groups": 4}, "gqa_groups: the model has 2, not 4; leave the key out"),
        ({"head_dim": 128}, "head_dim: the model has 8, not 128"),
        ({"hidden_dim": 4096}, "hidden_dim: the model has 32, not 4096"),
        ({"structure": "UL-MM", "remove_heads": 6}, "remove_heads: 6 heads are to go; 2 blocks can give 4"),
    ],
)
def test_what_a_model_contradicts_is_refused(tmp_path, keys, said):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match=rf"^llm\.FlapPruner\.{said}"):
        pruner(**keys).preflight(source, ("ranking", "pruning", "conversion"))
    pruner(gqa_groups=2, head_dim=8, hidden_dim=32, remove_heads=6).preflight(source, ("ranking",))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"PEFT_METHOD": "LoRA", "target_modules": ["query"]}, "target_modules"),
        ({"recovery": {"method": "lora", "target_modules": ["query"]}}, "recovery.target_modules"),
    ],
)
def test_adapters_of_unknown_linears_are_refused_before_anything_runs(tmp_path, keys, said):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    with pytest.raises(ValueError, match=rf"^llm\.FlapPruner\.{said}: no linear of a block is named query\. There are "):
        pruner(to_finetune=True, **keys).preflight(source, ("recovery",))
    pruner(to_finetune=False, **keys).preflight(source, ("ranking",))


def test_a_ranking_is_no_model(tmp_path):
    source, algorithm = ModelSource(save_family(tmp_path / "base", "llama")), pruner()
    ranking = calibrate(algorithm, source, tmp_path / "ranking")
    with pytest.raises(ValueError, match=f"^{re.escape(str(ranking.directory))} says what is to be pruned and holds no model"):
        algorithm.load(ranking)


def test_scores_of_flap_do_not_depend_on_places_for_biases():
    settings = {
        (metric, exports): pruner(exports, metrics=metric).stages()[0].settings
        for metric in ("OBS", "WIFV")
        for exports in (("padded",), ("ragged",))
    }
    assert settings["OBS", ("padded",)] != settings["OBS", ("ragged",)]
    assert settings["WIFV", ("padded",)] == settings["WIFV", ("ragged",)]


def test_without_a_refit_pruning_asks_for_no_text():
    for compensation, asks in (("least_squares", True), ("bias", False), ("none", False)):
        ranking, pruning, conversion = pruner(compensation=compensation).stages()
        assert (pruning.tokens is not None, pruning.distributed) == (asks, asks)
        assert ranking.tokens is not None
        assert ranking.distributed
        assert not conversion.distributed


@pytest.mark.parametrize(
    ("exports", "keys", "is_said"),
    [
        (("padded",), {"start_pruning_layer_idx": 1, "pruning_ratio": 0.4}, True),
        (("ragged",), {"start_pruning_layer_idx": 1, "pruning_ratio": 0.4}, False),
        (("padded",), {"structure": "UL-UM", "pruning_ratio": 0.4}, False),
        (("padded",), {"pruning_ratio": 0.0}, False),
    ],
)
def test_padding_that_undoes_the_pruning_is_said(tmp_path, caplog, exports, keys, is_said):
    run(pruner(exports, pad_neurons_to=1, **keys), ModelSource(save_family(tmp_path / "base", "llama")), tmp_path / "out")
    assert ("padded is no smaller than the original" in caplog.text) == is_said


@pytest.mark.parametrize(("structure", "asked", "heads"), [("UL-MM", 2, 4), ("AL-MM", 1, 2), ("AL-MM", 2, None)])
def test_heads_that_were_rounded_are_said(tmp_path, caplog, structure, asked, heads):
    source = ModelSource(save_family(tmp_path / "base", "llama"))
    run(pruner(structure=structure, remove_heads=asked, pruning_ratio=0.4), source, tmp_path / "out")
    assert [record.args[:2] for record in caplog.records if "remove_heads" in record.message] == (
        [(heads, asked)] if heads else []
    )
