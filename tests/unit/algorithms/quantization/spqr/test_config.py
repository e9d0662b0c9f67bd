"""Every key of SpQR's command line: its default, its limits, its warning or refusal; and what the bits count."""

import math

import pytest
from pydantic import ValidationError

from algorithms.quantization.spqr.algorithm import Spqr
from algorithms.quantization.spqr.calibration import settings
from algorithms.quantization.spqr.config import OUTLIER_BITS, SpqrConfig, bits_without_outliers

# Upstream's names with the values of the recipe that it recommends.
UPSTREAM = {
    **{"seed": 0, "nsamples": 128, "wbits": 4, "groupsize": 16, "percdamp": 1.0, "perchannel": True, "sym": False},
    **{"permutation_order": "act_order", "true_sequential": False, "qq_scale_bits": 3, "qq_zero_bits": 3, "qq_groupsize": 16},
    **{"qq_zero_sym": False, "round_zero": False, "outlier_threshold": 0.2, "simplified_outliers": False, "nearest": False},
    **{"new_eval": False, "skip_out_loss": False, "offload_activations": True, "wandb": False, "dtype": "auto"},
    **{"norm": None, "grid": None, "maxshrink": None, "reserved_bins": None, "mse": None, "qq_mse": None},
    **{"keep_last_columns": 0, "blocksize": 128, "load": None, "save": None, "custom_data_path": None},
}
OURS = {"max_outlier_share", "target_bits", "refinements", "targets", "reference_samples", "block_tuning", "val_size"}
OURS |= {"model_seqlen", "attn_implementation", "save_intermediate_results", "overwrite", "min_expert_tokens"}
PLAIN = {"qq_scale_bits": None, "qq_zero_bits": None}


def _config(**keys):
    return SpqrConfig.model_validate(keys)


def test_the_keys_are_those_of_upstream_and_take_its_recipe():
    values = _config(**UPSTREAM).model_dump(by_alias=True)
    assert set(values) == set(UPSTREAM) | OURS
    assert {key: values[key] for key in UPSTREAM} == UPSTREAM
    assert _config(**UPSTREAM).warnings() == ()


def test_the_defaults_are_the_recipe_s_but_for_the_damping_and_the_threshold():
    values = _config().model_dump(by_alias=True)
    assert {key: value for key, value in values.items() if key in UPSTREAM} == UPSTREAM | {
        "percdamp": 0.01,
        "outlier_threshold": 0.35,
    }
    assert values["max_outlier_share"] is values["target_bits"] is values["block_tuning"] is None
    assert values["refinements"] == 1


@pytest.mark.parametrize(
    ("keys", "place", "reason"),
    [
        ({"wbits": 0}, "wbits", "at least 1"),
        ({"wbits": 9}, "wbits", "1 to 8, or 16"),
        ({"groupsize": 0}, "groupsize", "-1"),
        ({"qq_scale_bits": 9}, "qq_scale_bits", "1 to 8"),
        ({"qq_zero_bits": 0}, "qq_zero_bits", "1 to 8"),
        ({"qq_groupsize": 0}, "qq_groupsize", "at least 1"),
        ({"round_zero": 2}, "round_zero", "true or false"),
        ({"outlier_threshold": 0}, "outlier_threshold", "above 0"),
        ({"outlier_threshold": -0.2}, "outlier_threshold", "above 0"),
        ({"outlier_threshold": "many"}, "outlier_threshold", "a number"),
        ({"max_outlier_share": 1.0}, "max_outlier_share", "below 1"),
        ({"max_outlier_share": -0.1}, "max_outlier_share", "at least 0"),
        ({"target_bits": 16}, "target_bits", "below 16"),
        ({"target_bits": 4.6}, "target_bits", "at least 4.625"),
        ({"wbits": 3, "target_bits": 3.6}, "target_bits", "at least 3.625"),
        ({"target_bits": 5.9, **PLAIN}, "target_bits", "at least 6"),
        ({"permutation_order": "actorder"}, "permutation_order", "act_order"),
        ({"percdamp": -1}, "percdamp", "at least 0"),
        ({"refinements": -1}, "refinements", "at least 0"),
        ({"load": "folder"}, "load", "resumes"),
        ({"save": "folder"}, "save", "a job keeps its own results"),
        ({"perchannel": False, "outlier_threshold": 0.2, **PLAIN}, "outlier_threshold", "simplified_outliers: true"),
        ({"groupsize": -1, "wbits": 4, "target_bits": 3.9}, "target_bits", "at least 4"),
        ({"perchannel": False, "outlier_threshold": None, **PLAIN, "qq_scale_bits": 3}, "qq_scale_bits", "share one statistic"),
        ({"perchannel": False, "outlier_threshold": None, **PLAIN, "qq_zero_bits": 3}, "qq_zero_bits", "share one statistic"),
        ({"perchannel": False, "outlier_threshold": None, "target_bits": 7, **PLAIN}, "target_bits", "simplified_outliers"),
    ],
)
def test_it_refuses_with_the_reason(keys, place, reason):
    with pytest.raises(ValidationError) as caught:
        _config(**keys)
    (error,) = caught.value.errors()
    assert error["loc"] == (place,)
    assert reason in error["ctx"]["expected"]


@pytest.mark.parametrize("value", [math.inf, "inf", ".inf", None])
def test_an_infinite_threshold_is_none(value):
    assert _config(outlier_threshold=value).outlier_threshold is None


@pytest.mark.parametrize(("value", "read"), [(0, False), (1, True), (None, False), (True, True), (False, False)])
def test_round_zero_reads_upstream_s_numbers(value, read):
    assert _config(round_zero=value).round_zero is read


@pytest.mark.parametrize("value", [16, "16"])
def test_sixteen_bits_ask_for_figures_alone(value):
    assert _config(wbits=value).evaluate_only
    assert not _config().evaluate_only
    assert not _config(wbits=8).evaluate_only


def test_what_is_set_without_effect_is_warned_about():
    inert = {"skip_out_loss": True, "new_eval": True, "norm": 2.0, "grid": 100, "maxshrink": 0.8, "reserved_bins": 1}
    inert |= {"mse": True, "qq_mse": True, "keep_last_columns": 4, "blocksize": 64, "custom_data_path": "x"}
    lines = _config(**inert).warnings("llm.SpQR.")
    assert {line.split()[0].removeprefix("llm.SpQR.") for line in lines} == set(inert)
    assert all("has no effect: " in line for line in lines)
    assert _config(keep_last_columns=0, blocksize=128, norm=None).warnings() == ()
    plain = _config().shaping
    assert _config(**inert).shaping == plain


def test_what_shapes_the_result_is_in_the_settings():
    plain = _config().shaping
    for keys in (
        {"wbits": 3},
        {"groupsize": 32},
        {"qq_groupsize": 8},
        {"qq_scale_bits": 4},
        {"outlier_threshold": 0.3},
        {"max_outlier_share": 0.01},
        {"target_bits": 5},
        {"permutation_order": "identity"},
        {"percdamp": 1},
        {"nearest": True},
        {"simplified_outliers": True},
        {"round_zero": True},
        {"sym": True},
        {"block_tuning": {}},
    ):
        assert _config(**keys).shaping != plain, keys


def test_the_column_quantizer_gets_them_all():
    keys = {"wbits": 3, "sym": True, "round_zero": True, "qq_scale_bits": 4, "qq_zero_bits": 2, "qq_groupsize": 8}
    keys |= {"qq_zero_sym": True, "simplified_outliers": True, "groupsize": -1}
    found = settings(_config(**keys), 64)
    assert (found.bits, found.group_size, found.run, found.top) == (3, 64, 8, 7)
    assert (found.scale_bits, found.zero_bits) == (4, 2)
    assert found.symmetric is found.round_zero is found.zero_symmetric is found.per_channel is True
    assert found.leave_one_out is False


def _count(rows, groups, *, bits, group_size, run, scale_bits, zero_bits, round_zero):
    """Bits a weight, piece by piece, of a matrix of so many rows and groups."""
    total = rows * groups * group_size * bits
    for statistic, two_level in ((scale_bits, True), (zero_bits, not round_zero or (zero_bits or 0) < bits)):
        if statistic is not None and two_level:
            total += rows * groups * statistic + rows // run * groups * 2 * 16
        else:
            total += rows * groups * (bits if round_zero and statistic is zero_bits and not two_level else 16)
    return total / (rows * groups * group_size)


def test_bits_without_outliers_are_the_papers():
    paper = {"group_size": 16, "run": 16, "round_zero": False, "scale_bits": 3, "zero_bits": 3}
    assert bits_without_outliers(bits=3, **paper) == 3.625
    assert bits_without_outliers(bits=4, **paper) == 4.625
    assert bits_without_outliers(bits=4, **(paper | {"scale_bits": None, "zero_bits": None})) == 4 + 32 / 16
    # (qs + wbits) / g + 32 / (g qg): whole zeros of no fewer bits than a code take a code each.
    assert bits_without_outliers(bits=3, **(paper | {"round_zero": True})) == 3 + (3 + 3) / 16 + 32 / 256
    assert bits_without_outliers(bits=4, **(paper | {"round_zero": True})) == 4.625  # 3 bits are fewer: two levels


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("round_zero", [False, True])
@pytest.mark.parametrize(("scale_bits", "zero_bits"), [(3, 3), (4, 2), (3, 8)])
@pytest.mark.parametrize(("group_size", "run"), [(16, 16), (32, 8), (64, 4)])
def test_bits_without_outliers_are_a_hand_count(bits, round_zero, scale_bits, zero_bits, group_size, run):
    known = {"bits": bits, "group_size": group_size, "run": run, "round_zero": round_zero}
    known |= {"scale_bits": scale_bits, "zero_bits": zero_bits}
    if scale_bits == zero_bits and round_zero and zero_bits >= bits:
        expected = bits + (scale_bits + 32 / run + bits) / group_size
    else:
        expected = _count(48, 5, **known)
    assert bits_without_outliers(**known) == pytest.approx(expected)


def test_the_share_of_outliers_that_bits_pay_for():
    assert OUTLIER_BITS == 32
    assert _config().outlier_share(16) is None
    assert _config(wbits=3, target_bits=4.1).outlier_share(16) == pytest.approx((4.1 - 3.625) / 32)
    # The maintainers' 4.63 bits of the 4-bit recipe stand for 0.02 % of outliers.
    assert _config(target_bits=4.63).outlier_share(16) == pytest.approx(0.0002, rel=0.25)
    assert _config(max_outlier_share=0.01).outlier_share(16) == 0.01
    assert _config(wbits=3, target_bits=4.1, max_outlier_share=0.001).outlier_share(16) == 0.001
    assert _config(wbits=3, target_bits=3.1, groupsize=-1).outlier_share(4096) == pytest.approx((0.1 - 10 / 4096) / 32)
    assert _config(wbits=3, target_bits=3.0, groupsize=-1).outlier_share(64) == 0.0


def test_the_registry_s_formats_are_the_plugin_s():
    assert SpqrConfig.export_formats == Spqr.formats


def test_without_channels_keys_that_are_left_out_go_with_it():
    config = _config(perchannel=False)
    assert (config.scale_bits, config.zero_bits, config.outlier_threshold) == (None, None, None)
    assert _config(perchannel=False, simplified_outliers=True).outlier_threshold == 0.35


def test_keys_that_another_one_overrules_warn():
    assert "target_bits decides" in _config(target_bits=5, outlier_threshold=0.2).warnings()[0]
    assert "makes no outliers" in _config(max_outlier_share=0.01, outlier_threshold=None).warnings()[0]
    assert _config(target_bits=5).warnings() == _config(max_outlier_share=0.01).warnings() == ()


def test_known_zeros_cost_a_bit_and_whole_ones_a_code():
    plain = {"bits": 3, "group_size": 16, "run": 16, "scale_bits": None, "zero_bits": None}
    assert bits_without_outliers(round_zero=False, symmetric=True, **plain) == 3 + 17 / 16
    assert bits_without_outliers(round_zero=True, **plain) == 3 + 19 / 16
    assert bits_without_outliers(round_zero=False, **plain) == 3 + 32 / 16
