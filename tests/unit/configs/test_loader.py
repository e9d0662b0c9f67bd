"""Recipes as a whole: what loads, what is reported, and where each problem is said to stand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from algorithms.registry import config_class
from configs.diagnosis import spellings
from configs.errors import RecipeError
from configs.loader import load_recipe
from tests.support.recipes import SEED_RECIPE, SMALL, load, problems_of


def test_the_recipe_of_the_guide_loads_unchanged():
    loaded = load_recipe(SEED_RECIPE, plugin_config=config_class)
    recipe, parameters = loaded.recipe, loaded.parameters
    assert (recipe.algorithm, recipe.job_service, recipe.job_id) == ("AQLM", "Kompress", "aqlm_quantization")
    assert recipe.job_folder == Path("user_data/jobs/Kompress/aqlm_quantization")
    assert recipe.logging_path == Path("user_data/logs/aqlm_quantization")
    assert (recipe.cuda_id, recipe.text_column, recipe.format_string) == ((0, 1, 2, 3), ("text",), None)
    assert parameters.calibration_config.num_samples == 2048
    assert parameters.finetune_config.microbatch_size == 2
    assert parameters.tunes
    assert loaded.resolved == yaml.safe_load(SEED_RECIPE.read_text())
    assert any("JOB_PATH" in line and "user_data/jobs/Kompress/aqlm_quantization" in line for line in loaded.warnings)


def test_every_problem_is_reported_with_line_value_and_nearest_key(tmp_path):
    text = (
        SMALL.replace("nsamples: 8", "nsampels: 8").replace("val_size: 2", "val_size: two")
        + "STAGE: [calibration]\nSPLIT: null\n"
    )
    found = {problem.key: problem for problem in problems_of(text, tmp_path)}
    assert set(found) == {"llm.AQLM.calibration_config.nsampels", "llm.AQLM.calibration_config.val_size", "STAGE", "SPLIT"}
    typo = found["llm.AQLM.calibration_config.nsampels"]
    assert (typo.line, typo.value, typo.nearest) == (8, 8, "nsamples")
    assert typo.file == str(tmp_path / "recipe.yaml")
    assert found["llm.AQLM.calibration_config.val_size"].line == 9
    assert found["STAGE"].nearest == "STAGES"
    assert found["SPLIT"].value is None


def test_the_error_lists_all_problems_in_the_order_of_the_file(tmp_path):
    with pytest.raises(RecipeError) as caught:
        load(SMALL + "NUM_PROCESSES: 0\nCUDA_ID: x\n", tmp_path, "EXPORT=[gguf]")
    message = str(caught.value)
    assert message.startswith("3 problems in the recipe:")
    assert (
        message.index("recipe.yaml:11: NUM_PROCESSES")
        < message.index("recipe.yaml:12: CUDA_ID")
        < message.index("command line: EXPORT")
    )


def test_a_key_in_the_wrong_block_is_sent_to_the_right_one(tmp_path):
    found = {problem.key: problem.nearest for problem in problems_of(SMALL + "nsamples: 3\nOVERWRITE: true\n", tmp_path)}
    assert found == {"nsamples": "llm.AQLM.calibration_config.nsamples", "OVERWRITE": "llm.AQLM.overwrite"}


def test_overrides_win_over_the_file_and_the_last_over_the_first(tmp_path):
    loaded = load(
        SMALL,
        tmp_path,
        "llm.AQLM.calibration_config.nsamples=16",
        "llm.AQLM.calibration_config.nsamples=32",
        "llm.AQLM.finetune_config.max_epochs=2",
        "STAGES=[calibration]",
        "JOB_ID=007",
        "llm.AQLM.overwrite=[calibration, conversion]",
        "EVALUATION={perplexity: [wikitext2], sequence_length: 256}",
    )
    assert loaded.parameters.calibration_config.num_samples == 32
    assert loaded.parameters.finetune_config.max_epochs == 2
    assert loaded.parameters.overwrite == ("calibration", "conversion")
    assert (loaded.recipe.stages, loaded.recipe.job_id) == (("calibration",), "007")
    assert loaded.recipe.evaluation.corpora == ("wikitext2",)
    assert loaded.resolved["llm"]["AQLM"]["calibration_config"]["nsamples"] == 32
    assert loaded.overrides[:2] == ("llm.AQLM.calibration_config.nsamples=16", "llm.AQLM.calibration_config.nsamples=32")


def test_a_wrong_override_is_named_as_typed(tmp_path):
    overrides = ("llm.AQLM.calibration_config.nsamples=many", "nonsense", "JOB_ID.x=1", "llm.AQLM.calibration_config.lr=true")
    found = problems_of(SMALL, tmp_path, *overrides)
    assert {problem.file for problem in found} == {"command line"}
    assert {problem.key for problem in found} == {
        "llm.AQLM.calibration_config.nsamples",
        "nonsense",
        "JOB_ID.x=1",
        "llm.AQLM.calibration_config.lr",
    }
    assert next(problem.value for problem in found if problem.key.endswith("nsamples")) == "many"


@pytest.mark.parametrize(("key", "nearest"), [("job_id", "JOB_ID"), ("Model", "MODEL"), ("stages", "STAGES")])
def test_an_override_in_the_wrong_case_is_named_as_typed(tmp_path, key, nearest):
    (problem,) = problems_of(SMALL, tmp_path, f"{key}=3")
    assert (problem.file, problem.line, problem.key, problem.nearest) == ("command line", None, key, nearest)
    (problem,) = problems_of(SMALL + f"{key}: 3\n", tmp_path)
    assert (problem.line, problem.key, problem.nearest) == (11, key, nearest)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("CORPORA.my.txt=a", "CORPORA.my.txt", "a"),
        ("CORPORA.one=[a]", "CORPORA.one", "[a]"),
        ("CORPORA.one.test=", "CORPORA.one.test", ""),
    ],
)
def test_what_is_wrong_below_corpora_is_named_by_its_own_place(tmp_path, override, key, value):
    (problem,) = problems_of(SMALL + "CORPORA:\n  two: b.txt\n", tmp_path, override)
    assert (problem.file, problem.line, problem.key, problem.value) == ("command line", None, key, value)
    (problem,) = problems_of(SMALL + "CORPORA:\n  two: b.txt\n  three: {tset: c}\n", tmp_path)
    assert (problem.line, problem.key, problem.value, problem.nearest) == (13, "CORPORA.three.tset", "c", "test")


def test_settings_are_known_by_their_keys():
    found = spellings(config_class("AQLM"))
    assert (found["init_max_iterations"], found["num_samples"], found["seed"]) == ("init_max_iter", "nsamples", "seed")


def test_null_skips_tuning_and_an_absent_block_means_its_defaults(tmp_path):
    assert not load(SMALL, tmp_path).parameters.tunes
    absent = load(SMALL.replace("    finetune_config: null\n", ""), tmp_path).parameters
    assert absent.tunes
    assert absent.finetune_config == type(absent.finetune_config)()
    assert load("ALGORITHM: AQLM\nJOB_ID: 1\nllm:\n", tmp_path).parameters == config_class("AQLM")()
    assert [p.key for p in problems_of(SMALL, tmp_path, "llm.AQLM.calibration_config=null")] == ["llm.AQLM.calibration_config"]


def test_json_is_read_as_strictly_and_knows_its_lines(tmp_path):
    text = json.dumps(yaml.safe_load(SMALL), indent="\t")
    assert load(text, tmp_path, name="recipe.json").recipe == load(SMALL, tmp_path).recipe
    bad = text.replace('"nsamples": 8', '"nsamples": 0')
    (problem,) = [p for p in problems_of(bad, tmp_path, name="recipe.json") if p.key.endswith("nsamples")]
    assert problem.line == next(number for number, line in enumerate(bad.splitlines(), 1) if "nsamples" in line)


def test_an_algorithm_that_there_is_not_is_told_with_the_nearest(tmp_path):
    (typo,) = problems_of(SMALL, tmp_path, "ALGORITHM=AQML")
    assert typo.nearest == "AQLM"
    (missing,) = problems_of(SMALL.replace("ALGORITHM: AQLM\n", ""), tmp_path)
    assert missing.key == "ALGORITHM"


def test_blocks_of_other_algorithms_warn_and_misspelt_ones_do_not_pass(tmp_path):
    warnings = load(SMALL, tmp_path, "llm.AutoAWQ.W_BIT=4").warnings
    assert any(line.startswith("llm.AutoAWQ has no effect") for line in warnings)
    (problem,) = problems_of(SMALL, tmp_path, "llm.AQML.dtype=float16")
    assert (problem.key, problem.nearest) == ("llm.AQML", "AQLM")


def test_what_is_loaded_does_not_change(tmp_path):
    loaded = load(SMALL, tmp_path)
    with pytest.raises(ValidationError):
        loaded.recipe.model = "other"
    with pytest.raises(ValidationError):
        loaded.parameters.calibration_config.num_samples = 3


def test_loading_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from pathlib import Path; "
        "from configs.loader import load_recipe; from algorithms.registry import config_class; "
        f"load_recipe(Path({str(SEED_RECIPE)!r}), plugin_config=config_class); "
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
