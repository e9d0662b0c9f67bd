"""References between the values of a recipe."""

import time

import pytest

from tests.support.recipes import SMALL, load, problems_of


def test_references_reach_text_numbers_and_blocks(tmp_path):
    text = SMALL + (
        "USER_FOLDER: data\nDATA_PATH: ${USER_FOLDER}/${DATASET_NAME}.json\nCACHE_PATH: ${oc.env:HOME}/cache\n"
        "LOGGING_PATH: ${DATA_PATH}.log\n"
    )
    loaded = load(text, tmp_path, "llm.AQLM.calibration_config.seed=${llm.AQLM.calibration_config.nsamples}")
    assert str(loaded.recipe.data_path) == "data/texts.json"
    assert str(loaded.recipe.logging_path) == "data/texts.json.log"
    assert loaded.parameters.calibration_config.seed == 8
    assert loaded.resolved["DATA_PATH"] == "data/texts.json"


def test_relative_references_and_escapes(tmp_path):
    text = SMALL.replace("val_size: 2", "val_size: ${.seed}\n      seed: 3") + "FORMAT_STRING: 'a \\${x} {text}'\n"
    loaded = load(text, tmp_path, "FORMAT_STRING=null")
    assert loaded.parameters.calibration_config.validation_size == 3


@pytest.mark.parametrize(
    ("value", "words", "nearest"),
    [
        ("${USER_FOLER}/x", "USER_FOLER is none", "USER_FOLDER"),
        ("${llm.AQLM.calibration_config.nsampels}", "is none", "llm.AQLM.calibration_config.nsamples"),
        ("${oc.env:NO_SUCH_VARIABLE_HERE}", "can be followed", None),
        ("${shell:ls}", "there is no ${shell:...}", None),
        ("${oc.decode:x}", "there is no", None),
        ("${MODEL", "each closed by }", None),
        ("${${MODEL}}", "without another inside", None),
        ("${DATA_PATH}", "lead back", None),
        ("???", "command line has to give", None),
    ],
)
def test_references_that_cannot_be_followed(tmp_path, value, words, nearest):
    (problem,) = problems_of(SMALL + f'USER_FOLDER: data\nDATA_PATH: "{value}"\n', tmp_path)
    assert (problem.key, problem.line, problem.value) == ("DATA_PATH", 12, value)
    assert words in problem.expected
    assert problem.nearest == nearest


def test_a_broken_reference_hides_neither_others_nor_other_problems(tmp_path):
    text = SMALL + "DATA_PATH: ${nope}\nCACHE_PATH: ${nope2}\nSPLIT: 3.5\nNUM_PROCESSES: ${llm.AQLM.finetune_config.x}\n"
    assert {problem.key for problem in problems_of(text, tmp_path)} == {"DATA_PATH", "CACHE_PATH", "SPLIT", "NUM_PROCESSES"}


def test_references_cannot_expand_without_bound(tmp_path):
    lines = ["a0: lol"] + [f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}" for i in range(1, 40)]
    start = time.perf_counter()
    found = problems_of("\n".join(lines), tmp_path)
    assert time.perf_counter() - start < 1
    assert any("expand to at most 2000 others" in problem.expected for problem in found)


def test_loops_of_several_values_end(tmp_path):
    found = {
        problem.key: problem.expected for problem in problems_of(SMALL + "DATA_PATH: ${SPLIT}\nSPLIT: ${DATA_PATH}\n", tmp_path)
    }
    assert "lead back" in found["DATA_PATH"]
    assert "lead back" in found["SPLIT"]
