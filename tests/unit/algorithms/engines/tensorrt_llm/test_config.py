"""The keys of ``llm.TensorRTLLM``."""

import pytest

from algorithms.engines.tensorrt_llm.config import TensorRtLlmConfig
from tests.support.recipes import load, problems_of

# Every key that recipes of this family carry, with the values that they carry.
KNOWN = """\
MODEL: org/name
ALGORITHM: TensorRTLLM
JOB_ID: engine
CUDA_ID: "0,1"
DATASET_NAME: wikitext
DATASET_SUBNAME: wikitext-2-raw-v1
DATA_PATH:
FORMAT_STRING:
llm:
  TensorRTLLM:
    to_quantize: true
    dtype: float16
    quant_method: "int4_awq"
    smoothquant: 0.5
    calib_size: 32
    max_input_len: 2048
    pp_size: 1
    per_channel: False
    per_token: False
    int8_kv_cache: False
    per_group: False
    load_by_shard: False
    hidden_act: silu
    rotary_base: 10000.0
    max_seq_length: 2048
    batch_size: 1
    awq_block_size: 128
    max_batch_size: 1
    max_output_len: 1024
    max_beam_width: 1
    max_num_tokens: null
    max_prompt_embedding_table_size: 0
    use_fused_mlp: false
"""
BLOCK = "llm.TensorRTLLM"


def test_known_recipes_load_without_a_warning(tmp_path):
    loaded = load(KNOWN, tmp_path)
    assert loaded.warnings == ()
    assert loaded.parameters.max_input_len == 2048
    assert loaded.parameters.runs_alone, "several devices start no ranks"


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [((), 2), (('CUDA_ID="3"',), 1), (("CUDA_ID=null",), 1), ((f"{BLOCK}.gpus=4",), 4), ((f"{BLOCK}.gpus=null",), 2)],
)
def test_there_are_as_many_gpus_as_cuda_id_names(tmp_path, overrides, gpus):
    parameters = load(KNOWN, tmp_path, *overrides).parameters
    assert parameters.gpus == gpus
    assert parameters.checkpoint_settings["gpus"] == parameters.build_settings["gpus"] == gpus


def test_keys_without_effect_are_said(tmp_path):
    keys = (f"{BLOCK}.pp_size=2", f"{BLOCK}.load_by_shard=true", f"{BLOCK}.kv_cache_dtype=int8")
    lines = load(KNOWN, tmp_path, *keys).warnings
    assert [line.partition(" has no effect")[0] for line in lines] == [key.partition("=")[0] for key in keys]


def test_keys_of_another_quantization_are_said_in_one_line(tmp_path):
    keys = (f"{BLOCK}.smoothquant=0.8", f"{BLOCK}.per_token=true", f"{BLOCK}.awq_block_size=64")
    assert load(KNOWN, tmp_path, *keys).warnings == (
        f"{BLOCK}.smoothquant, per_token without effect: quant_method: int4_awq does not use them",
    )
    assert load(KNOWN, tmp_path, f"{BLOCK}.to_quantize=false", *keys[1:]).warnings == (
        f"{BLOCK}.awq_block_size without effect: to_quantize: false does not use them",
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("quant_method=int4", "one of int4_awq, fp8, smoothquant, int8"),
        ("smoothquant=1.5", "a number above 0 and of at most 1"),
        ("max_batch_size=0", "a whole number of at least 1"),
        ("gpus=0", "a whole number of at least 1"),
        ("release=2", "one of 0.9, 1.0"),
        ("calib_dataset=org/texts", "null with release 0.9"),
    ],
)
def test_wrong_values_say_what_is_right(tmp_path, override, expected):
    (problem,) = problems_of(KNOWN, tmp_path, f"{BLOCK}.{override}")
    assert problem.expected.startswith(expected)


@pytest.mark.parametrize("written", ["1.0", '"1.0"'])
def test_a_release_needs_no_quotes(tmp_path, written):
    loaded = load(f"{KNOWN}    release: {written}\n    calib_dataset: org/texts\n", tmp_path)
    assert (loaded.parameters.release, loaded.parameters.calib_dataset) == ("1.0", "org/texts")


def test_settings_hold_what_reaches_the_commands_and_nothing_else():
    plain = TensorRtLlmConfig()
    for name, other in {"awq_block_size": 64, "calib_size": 1, "batch_size": 2, "dtype": "bfloat16", "gpus": 2}.items():
        assert TensorRtLlmConfig(**{name: other}).checkpoint_settings != plain.checkpoint_settings, name
    for name, other in {"smoothquant": 0.1, "per_token": True, "max_batch_size": 2, "examples_dir": "elsewhere"}.items():
        assert TensorRtLlmConfig(**{name: other}).checkpoint_settings == plain.checkpoint_settings, name
    assert TensorRtLlmConfig(max_batch_size=2).build_settings != plain.build_settings
    assert TensorRtLlmConfig(calib_size=1).build_settings == plain.build_settings
    unquantized = [TensorRtLlmConfig(to_quantize=False, quant_method=name).checkpoint_settings for name in ("fp8", "int8")]
    assert unquantized[0] == unquantized[1]
