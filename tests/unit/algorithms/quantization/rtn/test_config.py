import pytest
from pydantic import ValidationError

from algorithms.quantization.gptq.config import GptqConfig
from algorithms.quantization.rtn.algorithm import Rtn
from algorithms.quantization.rtn.config import RtnConfig


def test_the_keys_are_those_of_gptq_without_the_sweep_s():
    values, others = RtnConfig().model_dump(by_alias=True), GptqConfig().model_dump(by_alias=True)
    sweep = {"act_order", "static_groups", "percdamp", "refinements"}
    assert values == {key: value for key, value in others.items() if key not in sweep}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("wbits", 1, "from 2 to 8"), ("wbits", 9, "from 2 to 8"), ("groupsize", 0, "-1"), ("mse", "yes", "true or false")],
)
def test_it_refuses_with_the_reason(key, value, reason):
    with pytest.raises(ValidationError) as caught:
        RtnConfig.model_validate({key: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert reason in error["ctx"]["expected"]


def test_the_settings_are_those_of_the_grid_unless_blocks_are_tuned():
    plain = RtnConfig.model_validate({"wbits": 3}).shaping
    assert plain == {"bits": 3, "group_size": 128, "symmetric": True, "range_search": True}
    text = {"seed": 3, "targets": "compressed_prefix", "dtype": "float16", "nsamples": 4}
    assert RtnConfig.model_validate({"wbits": 3, **text}).shaping == plain
    tuned = RtnConfig.model_validate({"wbits": 3, "block_tuning": {}}).shaping
    assert tuned.items() > plain.items()
    assert RtnConfig.model_validate({"wbits": 3, "block_tuning": {}, **text}).shaping != tuned


def test_groups_are_never_scattered():
    assert Rtn.setting(RtnConfig()).has_column_groups is False
    assert RtnConfig.export_formats == Rtn.formats


def test_keys_about_the_text_warn_without_block_tuning():
    config = RtnConfig.model_validate({"wbits": 3, "nsamples": 8, "targets": "original"})
    assert config.warnings("llm.RTN.") == (
        "llm.RTN.nsamples, targets without effect: rounding uses no text without block_tuning",
    )
    assert RtnConfig.model_validate({"wbits": 3}).warnings("llm.RTN.") == ()
    assert RtnConfig.model_validate({"nsamples": 8, "block_tuning": {}}).warnings("llm.RTN.") == ()
