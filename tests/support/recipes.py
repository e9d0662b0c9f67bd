"""Recipes for tests: a complete one as text, and the loader with the real registry."""

from collections.abc import Sequence
from pathlib import Path

from algorithms.registry import config_class
from configs.errors import RecipeError, RecipeProblem
from configs.loader import LoadedRecipe, load_recipe

SEED_RECIPE = Path(__file__).resolve().parents[2] / "examples/text-generation/aqlm_quantization/config.yaml"

SMALL = """\
MODEL: org/name
ALGORITHM: AQLM
JOB_ID: trial
DATASET_NAME: texts
llm:
  AQLM:
    calibration_config:
      nsamples: 8
      val_size: 2
    finetune_config: null
"""


def load(text: str, folder: Path, *overrides: str, name: str = "recipe.yaml") -> LoadedRecipe:
    """The recipe ``text``, written into ``folder`` and loaded."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, overrides, plugin_config=config_class)


def problems_of(text: str, folder: Path, *overrides: str, name: str = "recipe.yaml") -> Sequence[RecipeProblem]:
    """The problems of the recipe ``text``; none if it loads."""
    try:
        load(text, folder, *overrides, name=name)
    except RecipeError as error:
        return error.problems
    return ()
