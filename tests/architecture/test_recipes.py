"""Every recipe that the project shows must hold."""

from pathlib import Path

import pytest

from algorithms.registry import config_class
from configs.loader import load_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted([*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("configs/presets/**/*.yaml")])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_recipe_holds(file):
    loaded = load_recipe(file, plugin_config=config_class)
    assert loaded.recipe.job_folder.parts[-2:] == (loaded.recipe.job_service, loaded.recipe.job_id)


def test_the_guide_is_among_them():
    assert ROOT / "examples/text-generation/aqlm_quantization/config.yaml" in RECIPES
