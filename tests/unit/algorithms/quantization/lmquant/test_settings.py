"""What keys come to: candidates written out from LMQuant's description of its numbers, and ranges by hand."""

import pytest

from algorithms.modeling.families.table import architecture_for
from algorithms.quantization.lmquant.quant_config import Quant
from algorithms.quantization.lmquant.settings import RangeSearch, candidates, resolve, role_of
from tests.support.models import FAMILIES

C = (0.25, 0.5, 0.75)  # the exponents of a grid of 4
NONE = {(0, 0)}
INPUTS = {(0.25, 0), (0.5, 0), (0.75, 0)}
WEIGHTS = {(0, 0.25), (0, 0.5), (0, 0.75)}
EQUAL = {(0.25, 0.25), (0.5, 0.5), (0.75, 0.75)}
RESTS = {(0.25, 0.75), (0.5, 0.5), (0.75, 0.25)}
PAIRS = {(a, b) for a in C for b in C}


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (0.5, 0.5, EQUAL),
        (0.3, 1, EQUAL),
        (0.5, 0, INPUTS),
        (0.5, -1, RESTS),
        (0.5, -2, INPUTS | RESTS),
        (0.5, -3, INPUTS | PAIRS),
        (0, 0.5, WEIGHTS),
        (0, 0, WEIGHTS | INPUTS),
        (0, -1, WEIGHTS | RESTS),
        (0, -2, WEIGHTS | INPUTS | RESTS),
        (0, -3, WEIGHTS | INPUTS | PAIRS),
        (-1, 0.5, RESTS),
        (-1, 0, INPUTS | RESTS),
        (-1, -1, RESTS),
        (-1, -2, INPUTS | RESTS),
        (-1, -3, INPUTS | PAIRS),
        (-2, 0.5, WEIGHTS | RESTS),
        (-2, 0, WEIGHTS | INPUTS | RESTS),
        (-2, -1, WEIGHTS | RESTS),
        (-2, -2, WEIGHTS | INPUTS | RESTS),
        (-2, -3, WEIGHTS | INPUTS | PAIRS),
        (-3, 0.5, WEIGHTS | PAIRS),
        (-3, 0, WEIGHTS | INPUTS | PAIRS),
        (-3, -1, WEIGHTS | INPUTS | PAIRS),
        (-3, -2, WEIGHTS | INPUTS | PAIRS),
        (-3, -3, WEIGHTS | INPUTS | PAIRS),
    ],
)
def test_candidates_of_a_grid(alpha, beta, expected):
    found = candidates(alpha, beta, 4)
    assert found[0] == (0, 0)
    assert set(found) == NONE | expected
    assert len(found) == len(set(found))


def test_qoq_searches_keys_alone_and_both_sides():
    found = candidates(0.5, -2.0, 20)
    assert len(found) == 1 + 19 + 19
    assert (0.05, 0.0) in found
    assert (0.95, pytest.approx(0.05)) in found
    assert (1.0, 0.0) not in found


@pytest.mark.parametrize(
    ("alpha", "beta", "pair"),
    [(0.05, 0.95, (0.05, 0.95)), (0.3, -1, (0.3, 0.7)), (0.3, -2, (0.3, 0.7)), (-1, 0.2, (0.8, 0.2)), (0, 1, (0, 1))],
)
def test_fixed_exponents_are_one_pair(alpha, beta, pair):
    assert candidates(alpha, beta, 0) == (pytest.approx(pair),)


def test_ratios_reach_down_and_up():
    search = {"objective": "TensorError", "degree": 2.0, "num_grids": 4}
    assert RangeSearch(**search, max_shrink=0.2, max_expand=1.0).ratios == pytest.approx((1, 0.8, 0.6, 0.4, 0.2))
    found = RangeSearch(**search, max_shrink=0.6, max_expand=1.4).ratios
    assert found == pytest.approx((1, 0.9, 0.8, 0.7, 0.6, 1.1, 1.2, 1.3, 1.4))


def _settings(**keys):
    return resolve(Quant.model_validate(keys))


ROLES = {
    "self_attn.q_proj": "proj_qkv", "self_attn.k_proj": "proj_qkv", "self_attn.v_proj": "proj_qkv",
    "self_attn.o_proj": "proj_out", "mlp.gate_proj": "proj_1st", "mlp.up_proj": "proj_1st", "mlp.down_proj": "proj_2nd",
}  # fmt: skip


def test_every_linear_has_the_role_of_its_group():
    for family in FAMILIES:
        architecture = architecture_for(family)
        assert {name: role_of(architecture, name) for name in architecture.linears} == ROLES


def test_nothing_is_done_unless_a_recipe_says_so():
    assert set(vars(_settings()).values()) == {None}


def test_weights_alone_and_cache_alone():
    weights = _settings(wgts={"dtype": "sint3", "group_shapes": [[1, 64]]}).weights
    assert (weights.bits, weights.symmetric, weights.group_size, weights.progressive) == (3, True, 64, False)
    alone = _settings(opts={"dtype": "zint4", "group_shapes": [[1, 128]]}, wgts={"dtype": None, "enable_calib_kernel": True})
    assert (alone.cache.bits, alone.cache.symmetric, alone.cache.group_size, alone.cache.static) == (4, False, 128, False)
    assert alone.weights is alone.gptq is alone.range_search is alone.inputs is None


@pytest.mark.parametrize(
    ("opts", "found"),
    [
        ({"group_shapes": [[1, -1]]}, (-1, False, 1.0)),
        ({"static": True, "group_shapes": [[-1, -1]]}, (-1, True, 1.0)),
        (
            {"static": True, "group_shapes": [[-1, -1]], "enable_calib_range": True, "calib_range": {"ratio": 0.9}},
            (-1, True, 0.9),
        ),
    ],
)
def test_scales_of_a_cache(opts, found):
    cache = _settings(opts={"dtype": "sint8", **opts}).cache
    assert (cache.group_size, cache.static, cache.ratio) == found


def test_a_cache_of_which_all_is_skipped_is_none():
    skips = {"skip_attn_q": True, "skip_attn_k": True}
    assert _settings(opts={"dtype": "sint8", **skips}).cache.skip_v is False
    assert _settings(opts={"dtype": "sint8", **skips, "skip_attn_v": True}).cache is None


def test_gptq_takes_both_switches_and_names_the_linears_it_leaves():
    kernel = {"enable_gptq": True, "gptq": {"damp_percentage": 0.02, "include_proj_out": False}}
    on = _settings(wgts={"dtype": "zint4", "enable_calib_kernel": True, "calib_kernel": kernel}).gptq
    assert (on.damping, on.skips) == (0.02, ("proj_out",))
    assert _settings(wgts={"dtype": "zint4", "calib_kernel": kernel}).gptq is None
    assert _settings(wgts={"dtype": "zint4", "enable_calib_kernel": True}).gptq is None


def test_a_fixed_ratio_is_a_search_of_one():
    wgts = {"dtype": "zint4", "calib_range": {"strategy": "Manual", "ratio": 0.9, "degree": 3, "num_grids": 7}}
    assert _settings(wgts=wgts).range_search.ratios == (0.9,)
    assert _settings(wgts={"dtype": "zint4"}).range_search is None
    assert _settings(wgts={**wgts, "enable_calib_range": False}).range_search is None


@pytest.mark.parametrize("name", ["xw", "yx"])
def test_smoothing_takes_both_switches(name):
    block = {name: {"strategy": "Manual", "alpha": " 0.3", "beta": " -2"}}
    on = {"enable_smooth": True, "smooth": {f"enable_{name}": True, **block}}
    found = vars(_settings(**on))[f"smooth_{name}"]
    assert found.candidates == (pytest.approx((0.3, 0.7)),)
    assert vars(_settings(**{**on, "enable_smooth": False}))[f"smooth_{name}"] is None
    assert vars(_settings(enable_smooth=True, smooth=block))[f"smooth_{name}"] is None


def test_queries_and_keys_may_be_skipped():
    smooth = {"enable_yx": True, "yx": {"skip_attn_qk": True}}
    assert _settings(enable_smooth=True, smooth=smooth).smooth_yx is None


def test_exponents_that_stand_for_the_same_candidates_are_the_same():
    def found(alpha):
        xw = {"alpha": alpha, "beta": -2}
        return _settings(enable_smooth=True, smooth={"enable_xw": True, "xw": xw}).smooth_xw

    assert found(0.2) == found(1)
    assert found(0.2) != found(0)
