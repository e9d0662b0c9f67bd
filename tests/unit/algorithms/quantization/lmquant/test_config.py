"""Every key of LMQuant's own files: read, warned about or refused; two spellings of one key; what makes a stage's key."""

import pytest
from pydantic import ValidationError

from algorithms.quantization.lmquant.config import LmquantConfig
from algorithms.quantization.lmquant.presets import PRESETS, leaves, over
from tests.unit.algorithms.quantization.lmquant.upstream import FURTHER, LLM, NYUNTAM_GCHN

# Named after no key of theirs: what all methods have.
OURS = {"nsamples", "model_seqlen", "val_size", "targets", "reference_samples", "true_sequential", "block_tuning"}
OURS |= {"min_expert_tokens"}
OURS |= {"offload_activations", "attn_implementation", "save_intermediate_results", "overwrite"}


def _config(**keys):
    return LmquantConfig.model_validate(keys)


def _refusals(**keys):
    with pytest.raises(ValidationError) as caught:
        _config(**keys)
    return [(error["loc"], error["ctx"]["expected"], error["input"]) for error in caught.value.errors()]


def _plain(value):
    """A value as upstream's files spell it."""
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def test_the_keys_are_those_of_upstream_and_take_their_values():
    everything = over(LLM, FURTHER)
    for values in (LLM, FURTHER, everything):
        dumped = dict(leaves(_config(**values).model_dump(by_alias=True)))
        for path, value in leaves(values):
            if path[-1] in ("group_scale_dtypes", "develop_dtype", "quant_type"):
                continue  # null and torch.float16 are one, torch.float32 loses its torch, default is llm
            assert _plain(dumped[path]) == value, path
    known = {path for path, _ in leaves(_config().model_dump(by_alias=True)) if path[0] not in OURS}
    missing = {path for path, _ in leaves(everything)} - known
    assert missing == set()
    # allow_kernel_calib is in some of their searches and not in others; here it is in all
    assert {path for path in known - {path for path, _ in leaves(everything)} if path[-1] != "allow_kernel_calib"} == set()


def test_upstream_s_defaults_are_the_defaults():
    defaults = dict(leaves(_config().model_dump(by_alias=True)))
    differing = {("seed",), ("save_model",), ("eval", "attach_timestamp"), *(path for path in defaults if path[0] == "model")}
    for path, value in leaves(LLM):
        if path in differing or path[0] in ("eval", "calib") or path[-1] in ("element_batch_size", "element_size"):
            continue
        assert _plain(defaults[path]) in (value, ["float16"], "float32"), path


def test_what_nyuntam_ships_as_gchn_is_our_gchn_kv8():
    pasted, preset = _config(quant=NYUNTAM_GCHN, calib={"seq_length": 1024}), _config(quant_type="gchn_kv8")
    assert pasted.shaping == preset.shaping
    assert pasted.sequence_length == preset.sequence_length
    assert [line.split(" has")[0] for line in pasted.warnings()] == ["quant.wgts.static", "quant.bias_correction"]
    assert _config(quant_type="gchn").shaping != preset.shaping


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("quant_type", "gchm", "one of default"),
        ("quant.wgts.dtype", "zint16", "zint8"),
        ("quant.wgts.dtype", "sint1", "sint2"),
        ("quant.wgts.dtype", "float8", "one of"),
        ("quant.wgts.group_shapes", [[1, -1], [1, 128], [1, 16]], "[[1, -1], [1, N]]"),
        ("quant.wgts.group_shapes", [[128, 128]], "[[1, N]]"),
        ("quant.wgts.group_shapes", [[1, 0]], "[[1, N]]"),
        ("quant.wgts.group_shapes", [], "[[1, N]]"),
        ("quant.wgts.group_shapes", 128, "[[1, N]]"),
        ("quant.wgts.group_shapes", [[1, "x"]], "a whole number"),
        ("quant.wgts.group_scale_dtypes", ["torch.float32"], "[torch.float16]"),
        ("quant.wgts.group_scale_dtypes", ["sint8", "torch.float16"], "[torch.float16, sint8]"),
        ("quant.wgts.compute_dtype", "sint4", "sint8"),
        ("quant.wgts.compute_group_level", 1, "from -1 to 0"),
        ("quant.wgts.saturate_compute_dtype", True, "nothing to saturate"),
        ("quant.wgts.skip_head", False, "stay as they are"),
        ("quant.wgts.skip_embed", False, "stay as they are"),
        ("quant.wgts.skip_router", False, "stay as they are"),
        ("quant.wgts.calib_range.max_shrink", 1.0, "below 1"),
        ("quant.wgts.calib_range.max_expand", 0.9, "at least 1"),
        ("quant.wgts.calib_range.ratio", 0, "above 0"),
        ("quant.wgts.calib_range.objective", "Error", "TensorError"),
        ("quant.wgts.calib_range.granularity", "Row", "ChannelGroup"),
        ("quant.wgts.calib_range.strategy", "Random", "GridSearch"),
        ("quant.wgts.calib_range.allow_kernel_calib", True, "rounding to nearest"),
        ("quant.wgts.calib_kernel.gptq.damp_percentage", -1, "at least 0"),
        ("quant.ipts.static", True, "token by token"),
        ("quant.ipts.dtype", "zint8", "sint8"),
        ("quant.ipts.group_shapes", [[1, 128]], "one scale for each token"),
        ("quant.ipts.group_scale_dtypes", ["torch.float16", "sint8"], "[torch.float16]"),
        ("quant.ipts.enable_calib_range", True, "token by token"),
        ("quant.ipts.share_size", 2, "no two tokens"),
        ("quant.opts.compute_dtype", "sint8", "one level"),
        ("quant.opts.group_shapes", [[2, 128]], "[[-1, -1]]"),
        ("quant.post_rotary", False, "behind their rotary embedding"),
        ("quant.develop_dtype", "int8", "float32"),
        ("quant.lm_head", True, "output layer"),
        ("quant.enable_select_wgts", True, "one setting"),
        ("quant.rotation.transform_proj_out", True, "Hadamard"),
        ("quant.rotation.transform_proj_2nd", True, "Hadamard"),
        ("quant.reorder.dynamic", True, "fixed"),
        ("quant.reorder.skip_residual", False, "residual stream"),
        ("quant.reorder.channel_metric", "WeightsAbsMax", "largest input"),
        ("quant.reorder.channel_index", "Random", "Sequential"),
        ("quant.smooth.xw.alpha", 1.5, "0 to 1"),
        ("quant.smooth.yx.beta", -4, "-3"),
        ("quant.smooth.yx.beta", "-0.5", "0 to 1"),
        ("quant.smooth.xw.ranges", [["AbsMax", "RootMeanSquare"]], "AbsMax, AbsMax"),
        ("quant.smooth.xw.objective", "TensorError", "OutputsError"),
        ("quant.smooth.xw.granularity", "Group", "Layer"),
        ("quant.smooth.xw.num_grids", 1, "at least 2"),
        ("eval.tasks", ["arc_challenge:many"], "arc_challenge:25"),
        ("eval.tasks", ["a b"], "arc_challenge:25"),
        ("eval.evaluator", "mine", "lm_eval"),
        ("calib.num_samples", "many", "a whole number"),
        ("calib.seq_length", 1, "at least 2"),
    ],
)
@pytest.mark.parametrize("preset", ["llm", "gchn"])
def test_it_refuses_with_the_reason(key, value, reason, preset):
    (found,) = _refusals(**{"quant_type": preset, key: value})
    place, expected, _ = found
    assert ".".join(place) == key
    assert reason in expected


@pytest.mark.parametrize(
    ("keys", "place", "reason"),
    [
        # one level of scales, two types of scales; and the reverse
        ({"quant_type": "g128", "quant.wgts.group_shapes": [[1, 128]]}, "quant.wgts.group_shapes", "go together"),
        ({"quant_type": "gchn", "quant.wgts.group_shapes": [[1, -1], [1, 128]]}, "quant.wgts.group_shapes", "go together"),
        (
            {"quant_type": "gchn", "quant.wgts.group_scale_dtypes": ["torch.float16", "sint8"]},
            "quant.wgts.group_scale_dtypes",
            "go together",
        ),
        ({"quant_type": "gchn", "quant.wgts.compute_dtype": "sint8"}, "quant.wgts.compute_dtype", "go together"),
        ({"quant_type": "gchn", "quant.wgts.compute_group_level": 0}, "quant.wgts.compute_group_level", "go together"),
        ({"quant_type": "g128", "quant.wgts.compute_dtype": None}, "quant.wgts.compute_dtype", "go together"),
        ({"quant_type": "g128", "quant.wgts.group_shapes": [[1, 64], [1, 16]]}, "quant.wgts.group_shapes", "go together"),
        ({"quant_type": "g128", "quant.wgts.dtype": "sint4"}, "quant.wgts.dtype", "zintN"),
        ({"quant_type": "gchn", "quant.opts.static": True}, "quant.opts.static", "belongs to no token"),
        ({"quant_type": "gchn", "quant.opts.group_shapes": [[-1, -1]]}, "quant.opts.group_shapes", "belongs to no token"),
        ({"quant_type": "gchn", "quant.opts.group_shapes": [[-1, 128]]}, "quant.opts.group_shapes", "belongs to no token"),
        ({"quant_type": "sq_static", "quant.opts.static": False}, "quant.opts.static", "belongs to no token"),
        ({"quant_type": "gchn", "quant.opts.enable_calib_range": True}, "quant.opts.enable_calib_range", "token by token"),
        (
            {"quant_type": "sq_static", "quant.opts.calib_range.strategy": "GridSearch"},
            "quant.opts.calib_range.strategy",
            "strategy: Manual",
        ),
        ({"quant_type": "g128", "quant.smooth.yx.alpha": 0}, "quant.smooth.yx.alpha", "nothing is smoothed"),
        (
            {"quant_type": "g128", "quant.smooth.xw": {"alpha": -1, "beta": -1}},
            "quant.smooth.xw.beta",
            "one negative exponent",
        ),
        ({"quant_type": "awq", "loads_with_qserve": True}, "loads_with_qserve", "8 bits"),
        ({"quant_type": "w4a8kv4_sym", "loads_with_qserve": True}, "loads_with_qserve", "groups of 128"),
        (
            {"quant_type": "g128", "loads_with_qserve": True, "quant.wgts.group_shapes": [[1, -1], [1, 64]]},
            "loads_with_qserve",
            "groups of 128",
        ),
        (
            {"quant_type": "gchn", "loads_with_qserve": True, "quant.wgts.dtype": None},
            "loads_with_qserve",
            "quantized weights",
        ),
        ({"quant_type": "gchn", "loads_with_qserve": True, "quant.opts.dtype": "zint3"}, "loads_with_qserve", "and not 3"),
        (
            {"quant_type": "gchn", "loads_with_qserve": True, "quant.enable_rotation": False},
            "loads_with_qserve",
            "rotation: true",
        ),
        (
            {"quant_type": "gchn", "loads_with_qserve": True, "quant.smooth.xw.skip_proj_1st": False},
            "loads_with_qserve",
            "skip_proj_1st to true",
        ),
        ({"quant_type": "sq_dynamic", "loads_with_qserve": True}, "loads_with_qserve", "all norms for ones"),
        ({"quant_type": "gchn", "quant.wgts.skip_proj_out": True}, "quant.wgts.skip_proj_out", "all linears of a block alike"),
        ({"quant_type": "g128", "quant.ipts.skip_proj_2nd": True}, "quant.ipts.skip_proj_2nd", "all linears of a block alike"),
        ({"quant_type": "gchn", "quant.wgts.calib_range.degree": 2.4}, "quant.wgts.calib_range.degree", "TensorError"),
        (
            {"quant_type": "gptq", "quant.wgts.calib_range.objective": "OutputsError"},
            "quant.wgts.calib_range.objective",
            "TensorError",
        ),
    ],
)
def test_what_does_not_go_together_is_reported_at_the_recipe_s_own_key(keys, place, reason):
    (found,) = _refusals(**keys)
    assert ".".join(found[0]) == place
    assert reason in found[1]


def test_several_contradictions_are_reported_together():
    found = _refusals(**{"quant_type": "gchn", "quant.opts.static": True, "quant.wgts.compute_dtype": "sint8"})
    assert [".".join(place) for place, _, _ in found] == ["quant.wgts.compute_dtype", "quant.opts.static"]


EIGHT_BITS = {"quant.enable_rotation": True, "quant.enable_smooth": False}


@pytest.mark.parametrize(
    ("preset", "keys"),
    [("gchn", {}), ("gchn_kv8", {}), ("g128", {}), ("sq_dynamic", EIGHT_BITS), ("sq_static", EIGHT_BITS)],
)
def test_what_qserve_runs_may_be_asked_for(preset, keys):
    assert _config(quant_type=preset, loads_with_qserve=True, **keys).loads_with_qserve


def test_blocks_that_are_off_contradict_nothing():
    off = {"quant.wgts.dtype": None, "quant.wgts.compute_dtype": "sint8", "quant.opts.dtype": None, "quant.opts.static": True}
    off |= {"quant.smooth.enable_yx": False, "quant.smooth.yx.alpha": 0}
    settings = _config(quant_type="g128", **off).settings
    assert settings.weights is settings.cache is settings.smooth_yx is None


def test_dotted_keys_are_blocks():
    dotted = {"quant.smooth.xw.alpha": 0.2, "quant.smooth.xw": {"beta": "0.8"}, "quant": {"opts.skip_attn_v": True}}
    nested = {"quant": {"smooth": {"xw": {"alpha": 0.2, "beta": 0.8}}, "opts": {"skip_attn_v": True}}}
    assert _config(quant_type="gchn", **dotted).shaping == _config(quant_type="gchn", **nested).shaping
    ((place, reason, value),) = _refusals(**{"quant.ipts.dtype": "sint8", "quant": {"ipts": {"dtype": None}}})
    assert (".".join(place), value) == ("quant.ipts.dtype", "sint8")
    assert "two" in reason


@pytest.mark.parametrize(
    ("ours", "theirs", "name", "value", "other"),
    [
        ("nsamples", "calib.num_samples", "num_samples", 7, 8),
        ("model_seqlen", "calib.seq_length", "sequence_length", 32, 64),
        ("save_intermediate_results", "keep_scales", "save_intermediate_results", True, False),
    ],
)
def test_two_names_of_one_key(ours, theirs, name, value, other):
    for keys in ({ours: value}, {theirs: value}, {ours: value, theirs: str(value)}):
        assert vars(_config(quant_type="awq", **keys))[name] == value
    ((place, reason, found),) = _refusals(**{ours: value, theirs: other})
    assert (".".join(place), found) == (theirs, other)
    assert ours in reason
    for keys in ({ours: "x"}, {theirs: "x"}):
        assert [".".join(place) for place, _, _ in _refusals(quant_type="awq", **keys)] == list(keys)


def test_python_names_do_as_well():
    config = LmquantConfig(quant_type="awq", num_samples=9, sequence_length=16)
    assert (config.num_samples, config.sequence_length, config.quant_type) == (9, 16, "awq")


@pytest.mark.parametrize(
    ("keys", "warned"),
    [
        ({"save_model": True, "loads_with_qserve": True, "keep_scales": True, "dtype": "torch.float32"}, []),
        ({"save_model": False, "loads_with_qserve": False}, ["loads_with_qserve", "save_model"]),
        ({"calib.min_seq_length": 0, "calib.max_seq_length": 512, "calib.data": "pileval"},
         ["calib.max_seq_length", "calib.data"]),
        ({"eval.tasks": "wikitext,gsm8k:5", "eval.num_gpus": 8}, ["eval.tasks", "eval.num_gpus"]),
        ({"model.name": "llama"}, ["model.name"]),
        ({"quant.develop_dtype": "torch.float64"}, ["quant.develop_dtype"]),
        ({"quant.smooth.xw.outputs_device": "cuda"}, ["quant.smooth.xw.outputs_device"]),
        ({"quant.wgts.calib_range.element_size": 512}, ["quant.wgts.calib_range.element_size"]),
        ({"quant.reorder": {"channel_index": "Sequential", "outputs_device": "cpu"}}, ["quant.reorder"]),
        ({"quant.reorder": {"channel_index": "Transpose"}}, []),
        ({"quant.reorder.outputs_device": "cuda"}, ["quant.reorder.outputs_device"]),
        ({"quant.enable_rotation": False}, []),
        ({"quant.enable_rotation": False, "quant.rotation.random": True}, ["quant.rotation"]),
        ({"quant.enable_smooth": False, "quant.smooth.xw.alpha": 0.3, "quant.smooth.yx.alpha": 0.3}, ["quant.smooth"]),
        ({"quant.smooth.enable_yx": False, "quant.smooth.yx.alpha": 0.3}, ["quant.smooth.yx"]),
        ({"quant.smooth.xw.num_grids": 10, "quant.smooth.yx.num_grids": 10}, ["quant.smooth.xw.num_grids"]),
        ({"quant.wgts.dtype": None}, []),
        ({"quant.wgts.dtype": None, "quant.wgts.calib_range.degree": 3}, ["quant.wgts"]),
        ({"quant.opts.dtype": None, "quant.opts.skip_attn_v": True}, ["quant.opts"]),
        ({"quant.ipts.calib_range.degree": 3}, ["quant.ipts.calib_range"]),
        ({"quant.opts.calib_range.ratio": 0.9}, ["quant.opts.calib_range"]),
        ({"quant.wgts.calib_range.ratio": 0.9}, ["quant.wgts.calib_range.ratio"]),
        ({"quant.wgts.calib_range.granularity": "Layer"}, ["quant.wgts.calib_range.granularity"]),
        ({"quant.wgts.calib_range": {"ratio": 0.9, "degree": 3, "strategy": "Manual"}}, ["quant.wgts.calib_range.degree"]),
        ({"quant.wgts.enable_calib_range": False, "quant.wgts.calib_range.degree": 3}, ["quant.wgts.calib_range"]),
        ({"quant.wgts.enable_calib_kernel": False, "quant.wgts.calib_kernel.gptq.damp_percentage": 1},
         ["quant.wgts.calib_kernel.gptq"]),
    ],
)  # fmt: skip
def test_what_is_set_without_effect_is_warned_about(keys, warned):
    config = _config(quant_type="gchn_kv8", **keys)
    lines = config.warnings("llm.LMQuant.")
    assert [line.split(" has no effect: ")[0].removeprefix("llm.LMQuant.") for line in lines] == warned
    assert all(" has no effect: " in line for line in lines)
    without = {key: value for key, value in keys.items() if key.endswith("dtype") or not key.startswith(tuple(warned))}
    assert _config(quant_type="gchn_kv8", **without).shaping == config.shaping


def test_presets_with_a_name_of_theirs_say_what_they_are():
    (line,) = _config(quant_type="gchn").warnings("llm.LMQuant.")
    assert line.startswith("llm.LMQuant.quant_type")
    assert "W4A8KV4" in line
    assert "gchn_kv8" in line
    assert all(_config(quant_type=name).warnings() == () for name in PRESETS if name != "gchn")


def test_nothing_to_quantize_is_said_and_measured():
    config = _config()
    assert config.evaluate_only
    (line,) = config.warnings("llm.LMQuant.")
    assert line.startswith("llm.LMQuant.quant_type")
    for keys in ({"quant.enable_rotation": True}, {"quant.opts.dtype": "sint8"}, {"quant_type": "awq"}):
        assert not _config(**keys).evaluate_only


def test_what_shapes_the_result_is_in_the_settings():
    plain = _config(quant_type="g128").shaping
    for key, value in {
        "seed": 1,
        "targets": "compressed_prefix",
        "quant.wgts.dtype": "zint3",
        "quant.wgts.group_shapes": [[1, -1], [1, 64]],
        "quant.wgts.calib_kernel.gptq.damp_percentage": 0.1,
        "quant.wgts.calib_kernel.gptq.include_proj_1st": False,
        "quant.wgts.enable_calib_kernel": False,
        "quant.ipts.dtype": None,
        "quant.opts.dtype": "sint4",
        "quant.opts.group_shapes": [[1, -1]],
        "quant.opts.skip_attn_q": False,
        "quant.rotation.random": True,
        "quant.enable_rotation": False,
        "quant.reorder.channel_index": "Transpose",
        "quant.reorder.strategy": "GridSearch",
        "quant.reorder.skip_proj_out": True,
        "quant.smooth.xw.alpha": 0.1,
        "quant.smooth.xw.skip_proj_out": True,
        "quant.smooth.yx.strategy": "GridSearch",
        "quant.smooth.yx.skip_attn_qk": True,
    }.items():
        assert _config(quant_type="g128", **{key: value}).shaping != plain, key
    search = {"quant.wgts.enable_calib_range": True, "quant.wgts.calib_range.strategy": "GridSearch"}
    searched = _config(quant_type="g128", **search).shaping
    for key, value in {"objective": "TensorError", "num_grids": 8, "max_shrink": 0.6,
                       "max_expand": 1.2, "skip_proj_qkv": True}.items():  # fmt: skip
        assert _config(quant_type="g128", **search, **{f"quant.wgts.calib_range.{key}": value}).shaping != searched, key


def test_the_text_and_the_way_of_working_are_not_in_the_settings():
    plain = _config(quant_type="g128").shaping
    assert not {"quant", "quant_type", "calib", "eval", "evaluation", "model", "nsamples", "num_samples"} & set(plain)
    keys = {"calib.num_samples": 4, "keep_scales": True, "loads_with_qserve": True, "offload_activations": False}
    assert _config(quant_type="g128", **keys).shaping == plain


def test_memory_remedies_name_the_key_that_the_recipe_has():
    for key in ("model_seqlen", "calib.seq_length"):
        (remedy,) = [line for line in _config(**{key: 64}).memory_remedies() if "seq" in line]
        assert remedy == f"{key}=32"
        assert _config(**{key: 64, remedy.partition("=")[0]: 32}).sequence_length == 32
