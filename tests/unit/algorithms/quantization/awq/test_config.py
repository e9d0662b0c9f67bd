from itertools import product

import pytest
from pydantic import ValidationError

from algorithms.formats import awq
from algorithms.quantization.awq.algorithm import Awq
from algorithms.quantization.awq.config import AWQ_BITS, AWQ_GROUPS, VERSIONS, AwqConfig
from algorithms.registry import config_class
from configs.errors import RecipeError
from configs.loader import load_recipe

# The example of nyuntam, key by key.
NYUNTAM = """
MODEL: "meta-llama/Meta-Llama-3.1-8B-Instruct"
DATASET_NAME: "wikitext"
DATASET_SUBNAME: "wikitext-2-raw-v1"
TEXT_COLUMN: "text"
SPLIT: "train"
DATA_PATH:
FORMAT_STRING:
llm:
  AutoAWQ:
    ZERO_POINT: True
    W_BIT: 4
    Q_GROUP_SIZE: 128
    VERSION: "GEMV"
CUDA_ID: "0"
ALGORITHM: "AutoAWQ"
JOB_SERVICE: "Kompress"
USER_FOLDER: "user_data"
JOB_ID: "awq_quantization"
CACHE_PATH: "user_data/.cache"
JOB_PATH: "user_data/jobs/awq_quantization"
LOGGING_PATH: "user_data/logs/awq_quantization"
ALGO_TYPE: "llm"
TASK: "llm"
"""


def _config(**keys):
    return AwqConfig.model_validate(keys)


def _load(folder, text, *overrides):
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml", overrides, plugin_config=config_class)


def test_the_keys_and_their_defaults():
    values = AwqConfig().model_dump(by_alias=True)
    own = {"ZERO_POINT": True, "W_BIT": 4, "Q_GROUP_SIZE": 128, "VERSION": "GEMM", "duo_scaling": "both", "apply_clip": True}
    own |= {"objective": "hessian", "search_steps": 20, "gptq": True, "percdamp": 0.01, "refinements": 1}
    own |= {"modules_to_not_convert": None}
    shared = {"nsamples": 128, "model_seqlen": 512, "seed": 0, "val_size": None, "targets": "original", "dtype": "auto"}
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
        ("W_BIT", 5, "one of 2, 3, 4, 8"),
        ("W_BIT", 16, "from 2 to 8"),
        ("W_BIT", True, "whole number"),
        ("Q_GROUP_SIZE", 0, "-1"),
        ("Q_GROUP_SIZE", "wide", "whole number"),
        ("VERSION", "GEMX", "one of GEMM, GEMV, GEMV_FAST"),
        ("VERSION", 1, "one of GEMM"),
        ("ZERO_POINT", 1, "true or false"),
        ("duo_scaling", "always", "true, false or both"),
        ("duo_scaling", 1, "true, false or both"),
        ("objective", "output", "one of hessian, block_output"),
        ("search_steps", 0, "from 1 to 1000"),
        ("percdamp", -0.1, "at least 0"),
        ("modules_to_not_convert", ["lm_head"], "null: embeddings"),
    ],
)
def test_it_refuses_with_the_reason(key, value, reason):
    with pytest.raises(ValidationError) as caught:
        _config(**{key: value})
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert reason in error["ctx"]["expected"]


@pytest.mark.parametrize(("value", "read"), [("gemv", "GEMV"), ("Gemv_Fast", "GEMV_FAST"), ("GEMM", "GEMM")])
def test_versions_are_read_in_any_case(value, read):
    assert _config(VERSION=value).awq_version == read
    assert Awq.setting(_config(VERSION=value)).awq_version == read.lower()


@pytest.mark.parametrize(("value", "read"), [("both", "both"), ("Both", "both"), (True, True), ("false", False)])
def test_duo_scaling_is_read(value, read):
    assert _config(duo_scaling=value).duo_scaling == read


def test_nyuntam_s_example_loads_as_it_is(tmp_path):
    loaded = _load(tmp_path, NYUNTAM)
    config = loaded.parameters
    assert (config.zero_point, config.bits, config.group_size, config.awq_version) == (True, 4, 128, "GEMV")
    assert not [line for line in loaded.warnings if "AutoAWQ" in line]
    assert Awq(config, loaded.recipe.export).exports == ("awq",)


def test_a_version_without_the_format_is_said_to_do_nothing(tmp_path):
    line = "llm.AutoAWQ.VERSION has no effect: it is a layout within the format awq, which this recipe does not export"
    assert line in _load(tmp_path, NYUNTAM, "EXPORT=[gptq,dense]").warnings
    assert line in _load(tmp_path, NYUNTAM, "llm.AutoAWQ.ZERO_POINT=false").warnings
    assert line not in _load(tmp_path, NYUNTAM, "EXPORT=[gptq,awq]").warnings
    silent = NYUNTAM.replace('VERSION: "GEMV"', "")
    assert line not in _load(tmp_path, silent, "EXPORT=[gptq,dense]").warnings


def test_the_configuration_knows_the_plugin_s_default_format():
    for bits, size, zero_point in product((2, 3, 4, 8), (16, 32, 64, 128, 256, -1), (True, False)):
        config = _config(W_BIT=bits, Q_GROUP_SIZE=size, ZERO_POINT=zero_point)
        assert config.is_awq_by_default is (Awq(config).exports == ("awq",))


def test_keys_of_the_sweep_do_nothing_without_it():
    config = _config(gptq=False, percdamp=0.1, refinements=2)
    assert config.warnings("llm.AutoAWQ.") == (
        "llm.AutoAWQ.percdamp, refinements without effect: gptq: false rounds to nearest",
    )
    assert _config(gptq=False).warnings() == _config(percdamp=0.1).warnings() == ()


def test_a_block_may_be_called_awq(tmp_path):
    assert _load(tmp_path, NYUNTAM.replace("AutoAWQ", "AWQ")).parameters == _load(tmp_path, NYUNTAM).parameters
    with pytest.raises(RecipeError, match="Q_GROUP_SIZE"):
        _load(tmp_path, NYUNTAM.replace("Q_GROUP_SIZE", "GROUP_SIZE"))


def test_the_registry_s_formats_are_the_plugin_s():
    assert AwqConfig.export_formats == Awq.formats
    assert tuple(version.upper() for version in awq.VERSIONS) == VERSIONS
    assert (awq.BITS, awq.GROUP_SIZES) == (AWQ_BITS, AWQ_GROUPS)
