import pytest
from pydantic import ValidationError

from algorithms.blockwise.config import BlockwiseParameters, columns_a_group
from algorithms.finetuning.config import BlockTuningConfig


def _config(**keys):
    return BlockwiseParameters.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "held_out"),
    [
        ({}, 0),
        ({"block_tuning": {}}, 16),
        ({"block_tuning": {}, "nsamples": 7}, 0),
        ({"block_tuning": {}, "nsamples": 40}, 5),
        ({"val_size": 3}, 3),
        ({"val_size": 0, "block_tuning": {}}, 0),
        ({"val_size": 127}, 127),
    ],
)
def test_an_eighth_is_held_out_where_blocks_are_tuned(keys, held_out):
    assert _config(**keys).held_out == held_out


@pytest.mark.parametrize(
    ("keys", "place", "reason"),
    [
        ({"val_size": 128}, ("val_size",), "fewer validation samples than nsamples, which is 128"),
        ({"val_size": 8, "nsamples": 8}, ("val_size",), "which is 8"),
        ({"val_size": -1}, ("val_size",), "at least 0"),
        ({"nsamples": 0}, ("nsamples",), "at least 1"),
        ({"nsamples": "many", "val_size": 3}, ("nsamples",), "a whole number"),
        ({"model_seqlen": 1}, ("model_seqlen",), "at least 2"),
        ({"targets": "reference"}, ("targets",), "original, compressed_prefix"),
        ({"reference_samples": 0}, ("reference_samples",), "at least 1"),
        ({"dtype": "int8"}, ("dtype",), "auto, float32"),
        ({"attn_implementation": "flash"}, ("attn_implementation",), "eager"),
        ({"seed": -1}, ("seed",), "from 0"),
        ({"block_tuning": {"max_epochs": 0}}, ("block_tuning", "max_epochs"), "at least 1"),
        ({"block_tuning": {"rounding_step": 0}}, ("block_tuning", "rounding_step"), "above 0"),
        ({"block_tuning": {"scale_step": 2}}, ("block_tuning", "scale_step"), "at most 1"),
        ({"block_tuning": {"batch_size": 0}}, ("block_tuning", "batch_size"), "at least 1"),
        ({"block_tuning": {"early_stop": 0}}, ("block_tuning", "early_stop"), "at least 1"),
    ],
)
def test_it_refuses_with_the_reason(keys, place, reason):
    with pytest.raises(ValidationError) as caught:
        _config(**keys)
    (error,) = caught.value.errors()
    assert error["loc"] == place
    assert reason in error["ctx"]["expected"]


def test_an_unknown_key_of_block_tuning_is_refused():
    with pytest.raises(ValidationError, match="epochs"):
        _config(block_tuning={"epochs": 3})


def test_steps_may_be_null():
    tuning = _config(block_tuning={"rounding_step": None, "scale_step": None, "other_step": "1e-3"}).block_tuning
    assert (tuning.rounding_step, tuning.scale_step, tuning.other_step) == (None, None, 1e-3)


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        ({"true_sequential": True}, True),
        ({"true_sequential": True, "targets": "compressed_prefix"}, False),
        ({"true_sequential": False}, False),
        ({}, False),
    ],
)
def test_true_sequential_is_warned_about_where_targets_imply_it(keys, warned):
    lines = _config(**keys).warnings("llm.GPTQ.")
    assert [line.split(" has")[0] for line in lines] == (["llm.GPTQ.true_sequential"] if warned else [])
    assert all("targets: compressed_prefix" in line for line in lines)


@pytest.mark.parametrize("tuning", [None, {}, {"micro_batch_size": 1, "use_checkpointing": True}])
@pytest.mark.parametrize("others", [{}, {"offload_activations": False, "dtype": "float16", "model_seqlen": 3}])
def test_memory_remedies_are_overrides_that_hold_and_are_not_in_force_yet(tuning, others):
    config = _config(block_tuning=tuning, **others)
    remedies = config.memory_remedies()
    values = config.model_dump(by_alias=True)
    for remedy in remedies:
        key, _, value = remedy.partition("=")
        outer, _, inner = key.partition(".")
        changed = {outer: {**(tuning or {}), inner: value}} if inner else {key: value}
        after = _config(**{"block_tuning": tuning, **others, **changed}).model_dump(by_alias=True)
        assert after != values, remedy
        assert after["model_seqlen"] >= 2
    assert len(remedies) == len(set(remedies))
    assert any("block_tuning" in remedy for remedy in remedies) is (tuning == {})
    assert ("offload_activations=true" in remedies) is bool(others)
    assert any("model_seqlen" in remedy for remedy in remedies) is not bool(others)


def test_the_remedies_that_change_nothing_come_first():
    config = _config(offload_activations=False, block_tuning={})
    changing = [
        _config(**{"block_tuning": {}, **_given(remedy)}).shaping != config.shaping
        or _config(**{"block_tuning": {}, **_given(remedy)}).sequence_length != config.sequence_length
        for remedy in config.memory_remedies()
    ]
    assert changing == [False, False, False, True, True]


def _given(remedy):
    key, _, value = remedy.partition("=")
    outer, _, inner = key.partition(".")
    return {outer: {inner: value}} if inner else {key: value}


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (True, True),
        ("false", False),
        (["calibration"], ("calibration",)),
        ("calibration, conversion", ("calibration", "conversion")),
    ],
)
def test_overwrite_is_a_flag_or_a_list_of_stages(value, read):
    assert _config(overwrite=value).overwrite == read


@pytest.mark.parametrize("value", [None, 1, ["finetune"], "calibration,calibration"])
def test_what_overwrite_is_not(value):
    with pytest.raises(ValidationError):
        _config(overwrite=value)


@pytest.mark.parametrize(("value", "size"), [(None, -1), (-1, -1), ("-1", -1), (1, 1), (16, 16)])
def test_columns_a_group(value, size):
    assert columns_a_group(value) == size


def test_tuning_settings_hold_what_shapes_a_block():
    shaping = _config(block_tuning={}).shaping["block_tuning"]
    assert set(BlockTuningConfig.model_fields) - set(shaping) == {"micro_batch_size", "use_checkpointing"}
