"""The command lines, against lists that were written out by hand."""

import itertools
import shlex
from pathlib import Path

import pytest

from algorithms.engines.tensorrt_llm.commands import (
    arguments,
    build_command,
    checkpoint_command,
    checkpoint_name,
    checkpoint_script,
    run_command,
)
from algorithms.engines.tensorrt_llm.config import METHODS, TensorRtLlmConfig
from algorithms.engines.tensorrt_llm.families import FAMILIES, family_of, told_about

# The options of the programs, copied from their sources: those that a command here could need. quantize.py of 0.9 (March 2024)
# and of 1.0, the converters as far as they could be read, trtllm-build of 0.9 and of 1.0.
OPTIONS = {
    ("0.9", "quantize"): "model_dir device dtype qformat seed max_seq_length batch_size calib_size output_dir tp_size pp_size "
    "awq_block_size kv_cache_dtype",
    ("1.0", "quantize"): "model_dir device device_map calib_dataset dtype qformat seed tokenizer_max_seq_length batch_size "
    "calib_size calib_max_seq_length output_dir tp_size pp_size cp_size awq_block_size kv_cache_dtype",
    ("0.9", "llama"): "model_dir tp_size pp_size dtype use_weight_only weight_only_precision smoothquant per_channel per_token "
    "int8_kv_cache per_group load_by_shard hidden_act rotary_base group_size output_dir workers",
    ("1.0", "llama"): "model_dir tp_size pp_size cp_size dtype use_weight_only weight_only_precision calib_dataset calib_size "
    "smoothquant per_channel per_token int8_kv_cache per_group load_by_shard hidden_act rotary_base output_dir workers",
    ("1.0", "gemma"): "ckpt-type model-dir output-model-dir world-size use-weight-only-with-precision dtype calib_dataset",
    ("1.0", "phi"): "model_dir tp_size pp_size dtype use_weight_only weight_only_precision output_dir workers",
    ("0.9", "build"): "checkpoint_dir output_dir workers max_batch_size max_input_len max_output_len max_beam_width "
    "max_num_tokens tp_size pp_size max_prompt_embedding_table_size use_fused_mlp gpus_per_node gemm_plugin",
    ("1.0", "build"): "checkpoint_dir output_dir workers max_batch_size max_input_len max_seq_len max_beam_width "
    "max_num_tokens max_prompt_embedding_table_size use_fused_mlp gemm_plugin",
}
OPTIONS |= {("0.9", "gemma"): OPTIONS["1.0", "gemma"], ("0.9", "phi"): OPTIONS["1.0", "phi"].replace("tp_size", "")}
QUANTIZE = "python /trt/examples/quantization/quantize.py --model_dir /m"
CONVERT = "python /trt/examples/llama/convert_checkpoint.py --model_dir /m"


def config(**keys):
    return TensorRtLlmConfig.model_validate({"examples_dir": "/trt/examples", **keys})


def checkpoint(model_type="llama", model=None, **keys):
    chosen = config(**keys)
    family = told_about(family_of(model_type, chosen.quant_method if chosen.to_quantize else None), model or {}, chosen.release)
    return shlex.join(checkpoint_command(family, chosen, model=Path("/m"), output=Path("/o")))


def build(model_type="llama", **keys):
    return shlex.join(build_command(FAMILIES[model_type], config(**keys), checkpoint=Path("/c"), output=Path("/o")))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {},
            f"{QUANTIZE} --qformat int4_awq --dtype float16 --awq_block_size 128 --calib_size 32 --output_dir /o --tp_size 1 "
            "--max_seq_length 2048 --batch_size 1",
        ),
        (
            {"awq_block_size": 64, "gpus": 4, "calib_size": 16, "batch_size": 2, "max_seq_length": 512, "dtype": "bfloat16"},
            f"{QUANTIZE} --qformat int4_awq --dtype bfloat16 --awq_block_size 64 --calib_size 16 --output_dir /o --tp_size 4 "
            "--max_seq_length 512 --batch_size 2",
        ),
        (
            {"quant_method": "fp8", "awq_block_size": 64},
            f"{QUANTIZE} --qformat fp8 --dtype float16 --calib_size 32 --output_dir /o --tp_size 1 --max_seq_length 2048 "
            "--batch_size 1",
        ),
        (
            {"quant_method": "smoothquant", "per_token": True, "per_channel": True, "gpus": 2},
            f"{CONVERT} --dtype float16 --output_dir /o --tp_size 2 --smoothquant 0.5 --per_token --per_channel",
        ),
        (
            {"quant_method": "smoothquant", "smoothquant": 0.8, "release": "1.0", "calib_dataset": "org/texts"},
            "python /trt/examples/models/core/llama/convert_checkpoint.py --model_dir /m --dtype float16 --output_dir /o "
            "--tp_size 1 --smoothquant 0.8 --calib_dataset org/texts --calib_size 32",
        ),
        (
            {"quant_method": "int8"},
            f"{CONVERT} --dtype float16 --output_dir /o --tp_size 1 --use_weight_only --weight_only_precision int8",
        ),
        (
            {"to_quantize": False, "gpus": 2, "int8_kv_cache": True, "per_group": True},
            f"{CONVERT} --dtype float16 --output_dir /o --tp_size 2 --int8_kv_cache --per_group --hidden_act silu "
            "--rotary_base 10000.0",
        ),
    ],
)
def test_checkpoints_of_llama(keys, expected):
    assert checkpoint(**keys) == expected


def test_checkpoints_of_other_families():
    assert checkpoint("gemma", quant_method="int8", gpus=2) == (
        "python /trt/examples/gemma/convert_checkpoint.py --model-dir /m --ckpt-type hf --dtype float16 --output-model-dir /o "
        "--world-size 2 --use-weight-only-with-precision int8"
    )
    assert checkpoint("phi", to_quantize=False) == (
        "python /trt/examples/phi/convert_checkpoint.py --model_dir /m --dtype float16 --output_dir /o"
    )
    assert checkpoint("phi", to_quantize=False, gpus=2).endswith("--tp_size 2")
    assert checkpoint("mixtral", quant_method="fp8") == checkpoint("llama", quant_method="fp8")


def test_the_build():
    assert build() == (
        "trtllm-build --output_dir /o --checkpoint_dir /c --gemm_plugin float16 --workers 1 --gpus_per_node 1 --tp_size 1 "
        "--max_batch_size 1 --max_input_len 1024 --max_output_len 1024 --max_beam_width 1"
    )
    everything = build(gpus=2, max_num_tokens=64, max_prompt_embedding_table_size=8, use_fused_mlp=True, max_batch_size=3)
    assert "--workers 2 --gpus_per_node 2 --tp_size 2 --max_batch_size 3" in everything
    assert everything.endswith("--max_num_tokens 64 --max_prompt_embedding_table_size 8 --use_fused_mlp")
    assert build(release="1.0", gpus=2, max_input_len=100, max_output_len=20, use_fused_mlp=True) == (
        "trtllm-build --output_dir /o --checkpoint_dir /c --gemm_plugin float16 --workers 2 --max_batch_size 1 "
        "--max_input_len 100 --max_seq_len 120 --max_beam_width 1 --use_fused_mlp enable"
    )


@pytest.mark.parametrize(("model_type", "longest"), [("llama", 1024), ("gemma", 1024), ("mistral", 32256), ("mixtral", 32256)])
def test_the_longest_input_is_the_familys_unless_the_recipe_says(model_type, longest):
    assert f"--max_input_len {longest} " in build(model_type)
    assert "--max_input_len 2048 " in build(model_type, max_input_len=2048)


@pytest.mark.parametrize(("release", "model_type"), itertools.product(("0.9", "1.0"), FAMILIES))
def test_every_option_is_one_that_the_program_has(release, model_type):
    family = FAMILIES[model_type]
    flags = {"per_token": True, "per_channel": True, "int8_kv_cache": True, "per_group": True, "use_fused_mlp": True}
    text = {"calib_dataset": "org/texts"} if release == "1.0" else {}
    numbers = {"max_num_tokens": 9, "max_prompt_embedding_table_size": 9, "release": release}
    for method in (None, *family.methods):
        chosen = {"quant_method": method} if method else {"to_quantize": False}
        script = "quantize" if method in ("int4_awq", "fp8") else family.folder
        lines = {script: checkpoint(model_type, **chosen, **flags, **numbers, **text), "build": build(**flags, **numbers)}
        for program, line in lines.items():
            given = {word.removeprefix("--") for word in shlex.split(line) if word.startswith("--")}
            assert len(given) >= 3
            assert given <= set(OPTIONS[release, program].split()), (program, method)


@pytest.mark.parametrize("model", [{"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}])
def test_the_converter_is_told_what_it_would_not_read_from_the_model(model):
    """Older converters take 10000 unless told, and the engine would compute something else than the model."""
    for keys in ({"quant_method": "int8"}, {"quant_method": "smoothquant"}, {"to_quantize": False}):
        assert checkpoint(model=model, **keys).endswith("--rotary_base 1000000.0")
    assert "--hidden_act gelu" in checkpoint(model={"hidden_act": "gelu"}, quant_method="int8")
    assert "rotary_base" not in checkpoint("gemma", model=model, quant_method="int8")


def test_stretched_rotary_embeddings_need_a_release_that_reads_them():
    for model in ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"rope_type": "llama3"}}):
        with pytest.raises(ValueError, match=r"rotary embeddings are stretched \((linear|llama3)\).*release: 1.0 does"):
            checkpoint(model=model)
        assert checkpoint(model=model, release="1.0") == checkpoint(release="1.0")
    assert checkpoint(model={"rope_scaling": None}) == checkpoint()


def test_unsupported_pairs_name_what_is_supported():
    with pytest.raises(
        ValueError, match=r"quant_method: smoothquant is not supported for mistral, which has int4_awq, fp8, int8"
    ):
        family_of("mistral", "smoothquant")
    with pytest.raises(ValueError, match=r"phi cannot be quantized on the way; write to_quantize: false"):
        family_of("phi", "int8")
    with pytest.raises(ValueError, match=r"model type 'qwen2'; there are llama, mistral, mixtral, gemma, phi"):
        family_of("qwen2", None)
    supported = {name: {method for method in METHODS if method in row.methods} for name, row in FAMILIES.items()}
    both = {"int4_awq", "fp8", "int8"}
    assert supported == {"llama": {*METHODS}, "mistral": both, "mixtral": both, "gemma": both, "phi": set()}


def test_null_false_and_zero_are_left_out_and_true_is_the_name_alone():
    given = {"a": None, "b": False, "c": 0, "d": True, "e": 1, "f": "x y", "g": 0.0, "h": Path("/p")}
    assert arguments(given) == ("--d", "--e", "1", "--f", "x y", "--h", "/p")


def test_folders_have_the_names_that_recipes_of_this_family_know(tmp_path, monkeypatch):
    assert checkpoint_name(FAMILIES["mistral"], config()) == "tllm_checkpoint_llama_int4_awq"
    assert checkpoint_name(FAMILIES["gemma"], config(to_quantize=False)) == "tllm_checkpoint_gemma"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    relative = config(examples_dir="examples", release="1.0", calib_dataset="texts")
    assert checkpoint_script(FAMILIES["llama"], relative) == tmp_path / "examples/quantization/quantize.py"
    line = checkpoint_command(FAMILIES["llama"], relative, model=Path("m"), output=Path("o"))
    assert {str(tmp_path / name) for name in ("m", "o", "texts")} <= set(line), "the programs have another working folder"
    assert shlex.join(run_command("/m", ".")) == "python run.py --max_output_len 1000 --tokenizer_dir /m --engine_dir ."
