import pytest
from pydantic import ValidationError

from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.config import GptqConfig


def _config(**keys):
    return GptqConfig.model_validate(keys)


def test_the_keys_and_their_defaults():
    values = GptqConfig().model_dump(by_alias=True)
    own = {"wbits": 4, "groupsize": 128, "sym": True, "act_order": True, "static_groups": True}
    own |= {"percdamp": 0.01, "mse": True, "refinements": 1}
    shared = {"nsamples": 128, "model_seqlen": 2048, "seed": 0, "val_size": None, "targets": "original", "dtype": "auto"}
    shared |= {
        "reference_samples": None,
        "true_sequential": False,
        "min_expert_tokens": None,
        "block_tuning": None,
        "offload_activations": True,
    }
    shared |= {"attn_implementation": None, "overwrite": False, "save_intermediate_results": False}
    assert values == own | shared


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("wbits", 1, "from 2 to 8"),
        ("wbits", 9, "from 2 to 8"),
        ("wbits", True, "whole number"),
        ("groupsize", 0, "-1"),
        ("groupsize", -2, "-1"),
        ("groupsize", 1.5, "whole number"),
        ("percdamp", -0.1, "at least 0"),
        ("refinements", -1, "at least 0"),
        ("sym", 1, "true or false"),
        ("act_order", None, "true or false"),
    ],
)
def test_it_refuses_with_the_reason(key, value, reason):
    with pytest.raises(ValidationError) as caught:
        _config(**{key: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert reason in error["ctx"]["expected"]


def test_an_unknown_key_is_refused():
    with pytest.raises(ValidationError, match="actorder"):
        _config(actorder=True)


@pytest.mark.parametrize(("value", "size"), [(None, -1), (-1, -1), (1, 1), ("64", 64), (128.0, 128)])
def test_group_sizes(value, size):
    assert _config(groupsize=value).group_size == size


@pytest.mark.parametrize(
    ("changes", "scattered"),
    [
        ({}, False),
        ({"static_groups": False}, True),
        ({"static_groups": False, "act_order": False}, False),
        ({"static_groups": False, "groupsize": -1}, False),
    ],
)
def test_groups_are_scattered_where_the_order_is_and_they_are_not_static(changes, scattered):
    assert Gptq.setting(_config(**changes)).has_column_groups is scattered


def test_the_registry_s_formats_are_the_plugin_s():
    assert GptqConfig.export_formats == Gptq.formats
