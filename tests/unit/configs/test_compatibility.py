"""Keys of older recipes."""

import pytest

from tests.support.recipes import SMALL, load, problems_of


def test_ignored_keys_warn_once_each(tmp_path):
    keys = ("OUTPUT_PATH", "ALGO_TYPE", "PLATFORM", "DATA_URL")
    warnings = load(SMALL, tmp_path, *(f"{key}=x" for key in keys)).warnings
    assert [line.split()[0] for line in warnings] == list(keys)
    assert load(SMALL, tmp_path, *(f"{key}=" for key in keys)).warnings == ()


def test_job_path_says_whether_it_differs(tmp_path):
    (other,) = load(SMALL, tmp_path, "JOB_PATH=user_data/jobs/trial").warnings
    assert "user_data/jobs/Kompress/trial" in other
    (same,) = load(SMALL, tmp_path, "JOB_PATH=user_data/jobs/Kompress/trial").warnings
    assert "the same folder" in same


def test_the_model_that_nobody_chose_is_named(tmp_path):
    loaded = load(SMALL.replace("MODEL: org/name\n", ""), tmp_path)
    assert loaded.recipe.model == "huggyllama/llama-7b"
    assert any("huggyllama/llama-7b" in line for line in loaded.warnings)


@pytest.mark.parametrize("key", ["VLM_DATASET", "IMAGE_COLUMN"])
def test_images_are_refused(tmp_path, key):
    (problem,) = problems_of(SMALL, tmp_path, f"{key}=photos")
    assert (problem.key, problem.value) == (key, "photos")
    assert "not on images" in problem.expected
    assert problems_of(SMALL, tmp_path, f"{key}=") == ()
