"""Every recipe that the project shows must hold, read by the loader that reads the users' own."""

import pytest

from algorithms.registry import REGISTRY, config_class
from configs.errors import RecipeError
from configs.loader import load_recipe
from tests.support.source_tree import ROOT, shipped_recipes

RECIPES = shipped_recipes()


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_recipe_holds(file):
    loaded = load_recipe(file, plugin_config=config_class)
    assert loaded.recipe.job_folder.parts[-2:] == (loaded.recipe.job_service, loaded.recipe.job_id)
    assert type(loaded.parameters) is config_class(loaded.recipe.algorithm)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_wrong_key_in_it_would_show(file):
    with pytest.raises(RecipeError) as error:
        load_recipe(file, ["llm.NO_SUCH_KEY.x=1", "NO_SUCH_KEY=1"], plugin_config=config_class)
    assert {problem.key for problem in error.value.problems} == {"llm.NO_SUCH_KEY", "NO_SUCH_KEY"}


def test_every_algorithm_has_an_example():
    shown = {load_recipe(file, plugin_config=config_class).recipe.algorithm for file in RECIPES if "examples" in file.parts}
    assert shown == {row.name for row in REGISTRY}
