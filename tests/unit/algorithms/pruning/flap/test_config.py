import json

import pytest
from pydantic import ValidationError

from algorithms.finetuning.adapt_keys import AdaptKeys
from algorithms.pruning.flap.config import FlapConfig
from configs.loader import load_recipe

# As nyuntam's own example has it.
NYUNTAM = {
    "dtype": "float16",
    "metrics": "WIFV",
    "nsamples": 1024,
    "pruning_ratio": 0.5,
    "remove_heads": -1,
    "seed": 0,
    "start_pruning_layer_idx": 22,
    "structure": "AL-AM",
    "to_finetune": False,
}


def _config(**keys):
    return FlapConfig.model_validate(keys, by_alias=True, by_name=False)


def test_the_keys_and_their_defaults():
    adapted = {field.alias or name for name, field in AdaptKeys.model_fields.items()} - {"to_finetune"}
    values = {key: value for key, value in FlapConfig().model_dump(by_alias=True).items() if key not in adapted}
    own = {"metrics": "OBS", "structure": "AL-AM", "pruning_ratio": 0.2, "remove_heads": -1, "start_pruning_layer_idx": 0}
    own |= {"compensation": "least_squares", "ridge": 0.01, "to_finetune": None, "legacy_layer_offset": False}
    own |= {"gqa_groups": None, "head_dim": None, "hidden_dim": None, "eval": False, "save_model": None, "pad_neurons_to": 32}
    shared = {"nsamples": 1024, "model_seqlen": 128, "seed": 0, "val_size": None, "targets": "original", "dtype": "auto"}
    shared |= {"reference_samples": None, "true_sequential": False, "block_tuning": None, "offload_activations": True}
    shared |= {"min_expert_tokens": None}
    shared |= {"attn_implementation": None, "overwrite": False, "save_intermediate_results": False}
    assert values == own | shared


def test_a_recipe_of_nyuntam_holds_without_a_warning():
    config = _config(**NYUNTAM)
    assert config.warnings() == ()
    assert (config.pruning_ratio, config.start_pruning_layer_idx, config.dtype) == (0.5, 22, "float16")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("metrics", "N/A", "OBS, IFV, WIFV, WIFN (N/A ranks nothing)"),
        ("metrics", "wifv", "one of OBS, IFV, WIFV, WIFN"),
        ("structure", "AM-AL", "UL-UM, UL-MM, AL-MM, AL-AM"),
        ("pruning_ratio", 1.0, "below 1"),
        ("pruning_ratio", -0.1, "at least 0"),
        ("remove_heads", -2, "at least -1"),
        ("remove_heads", 1.5, "whole number"),
        ("start_pruning_layer_idx", -1, "at least 0"),
        ("compensation", "full", "least_squares, bias, none"),
        ("ridge", 0, "above 0"),
        ("gqa_groups", 0, "at least 1"),
        ("to_finetune", 1, "true or false"),
        ("legacy_layer_offset", True, "ranked and pruned"),
        ("targets", "compressed_prefix", "takes the original's outputs"),
        ("pad_neurons_to", 0, "at least 1"),
        ("block_tuning", {}, "null"),
        ("overwrite", ["calibration"], "ranking, pruning, recovery, conversion"),
        ("model_seqlen", 1, "at least 2"),
    ],
)
def test_it_refuses_with_the_reason(key, value, reason):
    with pytest.raises(ValidationError) as caught:
        _config(**{key: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert reason in error["ctx"]["expected"]


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="prunning_ratio"):
        _config(prunning_ratio=0.2)


def test_the_length_has_two_spellings():
    assert _config(seqlen="256").sequence_length == _config(model_seqlen=256).sequence_length == 256
    assert _config(seqlen=256) == _config(model_seqlen=256)
    for keys, said in (({"seqlen": 1}, "at least 2"), ({"seqlen": 64, "model_seqlen": 64}, "model_seqlen alone")):
        with pytest.raises(ValidationError) as caught:
            _config(**keys)
        (error,) = caught.value.errors()
        assert said in error["ctx"]["expected"]
        assert error["ctx"]["below"] == ("seqlen",)


def test_the_loader_names_the_line_of_the_second_spelling(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"ALGORITHM": "X", "MODEL": "a/b", "JOB_ID": "c", "llm": {"FlapPruner": {"seqlen": 1}}}))
    with pytest.raises(ValueError, match=r"llm\.FlapPruner\.seqlen\n  found     1\n  expected  a whole number of at least 2"):
        load_recipe(file, plugin_config=lambda name: FlapConfig)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "to_finetune is missing, which means false"),
        ({"to_finetune": True, "remove_heads": 8}, "remove_heads has no effect"),
        ({"to_finetune": False, "remove_heads": 0, "structure": "UL-UM"}, "remove_heads has no effect"),
        ({"to_finetune": False, "compensation": "bias", "ridge": 0.1}, "ridge has no effect"),
        ({"to_finetune": False, "val_size": 2}, "val_size has no effect"),
        ({"to_finetune": False, "save_model": True}, "save_model has no effect"),
        ({"to_finetune": False, "eval": True}, "eval has no effect"),
    ],
)
def test_what_has_no_effect_is_said(keys, said):
    (line,) = _config(**keys).warnings("llm.FlapPruner.")
    assert line.startswith(f"llm.FlapPruner.{said}")


@pytest.mark.parametrize(
    "keys",
    [
        {"structure": "AL-MM", "remove_heads": 8},
        {"structure": "UL-MM", "remove_heads": 0},
        {"compensation": "bias"},
        {"to_finetune": True, "save_model": None, "eval": False},
    ],
)
def test_what_has_an_effect_is_not(keys):
    assert _config(**{"to_finetune": False, **keys}).warnings() == ()


def _moves(base, **keys):
    """Which stages have another key when ``keys`` change."""
    before, after = _config(**base), _config(**{**base, **keys})
    ranked = before.ranking_shaping != after.ranking_shaping
    return {"ranking": ranked, "pruning": ranked or before.pruning_shaping != after.pruning_shaping}


RANKING, PRUNING = {"ranking": True, "pruning": True}, {"ranking": False, "pruning": True}
NOTHING = {"ranking": False, "pruning": False}


@pytest.mark.parametrize(
    ("base", "keys", "moved"),
    [
        ({}, {"metrics": "IFV"}, RANKING),
        ({}, {"structure": "UL-UM"}, RANKING),
        ({}, {"pruning_ratio": 0.3}, RANKING),
        ({}, {"start_pruning_layer_idx": 1}, RANKING),
        ({}, {"dtype": "float16"}, RANKING),
        ({}, {"attn_implementation": "eager"}, RANKING),
        ({}, {"remove_heads": 8}, NOTHING),
        ({"structure": "AL-MM"}, {"remove_heads": 8}, RANKING),
        ({"structure": "AL-MM"}, {"remove_heads": 0}, RANKING),
        ({}, {"compensation": "bias"}, PRUNING),
        ({}, {"ridge": 0.1}, PRUNING),
        ({"compensation": "bias"}, {"ridge": 0.1}, NOTHING),
        ({}, {"reference_samples": 5}, PRUNING),
        ({"compensation": "none"}, {"reference_samples": 5}, NOTHING),
        ({}, {"true_sequential": True, "pad_neurons_to": 1}, NOTHING),
        ({}, {"to_finetune": True, "gqa_groups": 2, "save_model": "x", "eval": True, "offload_activations": False}, NOTHING),
        ({}, {"nsamples": 8, "seed": 3, "seqlen": 64, "overwrite": True, "save_intermediate_results": True}, NOTHING),
    ],
)
def test_each_stage_follows_its_own_keys(base, keys, moved):
    assert _moves(base, **keys) == moved


def test_the_values_of_a_stage_are_plain():
    config = _config(structure="AL-MM", remove_heads=8)
    assert json.loads(json.dumps(config.shaping)) == {**config.ranking_shaping, **config.pruning_shaping}
    assert config.shaping["remove_heads"] == 8


@pytest.mark.parametrize(
    ("keys", "size", "removed"),
    [
        ({"structure": "AL-MM", "pruning_ratio": 0.25}, (4, 8, 4), 8),
        ({"structure": "AL-MM", "pruning_ratio": 0.2}, (4, 8, 4), 6),  # 6.4 groups
        ({"structure": "UL-MM", "pruning_ratio": 0.2}, (4, 8, 4), 8),  # 1.6 groups of each block
        ({"structure": "UL-MM", "pruning_ratio": 0.0}, (4, 8, 4), 0),
        ({"structure": "UL-MM", "pruning_ratio": 0.9}, (4, 2, 2), 4),  # one group of each block stays
        ({"structure": "AL-MM", "remove_heads": 8}, (4, 8, 4), 2),
        ({"structure": "AL-MM", "remove_heads": 10}, (4, 8, 4), 3),
        ({"structure": "UL-MM", "remove_heads": 10}, (4, 8, 1), 12),  # 2.5 heads of each block
        ({"structure": "UL-MM", "remove_heads": 4}, (4, 8, 4), 0),
        ({"structure": "AL-MM", "remove_heads": 0}, (4, 8, 4), 0),
        ({"structure": "AL-MM", "remove_heads": 112}, (4, 8, 4), 28),
    ],
)
def test_heads_that_go_where_neurons_are_matched_to_them(keys, size, removed):
    blocks, groups, heads = size
    assert _config(**keys).groups_to_remove(blocks=blocks, groups=groups, heads_a_group=heads) == removed


def test_more_heads_than_there_are_to_give():
    config = _config(structure="AL-MM", remove_heads=116)
    with pytest.raises(ValueError, match="remove_heads: 116 heads are to go; 4 blocks can give 112"):
        config.groups_to_remove(blocks=4, groups=8, heads_a_group=4)
