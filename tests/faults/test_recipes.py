"""Shipped recipes, damaged in as many ways as fit a test; ``python -m tests.faults.recipes`` tries more."""

from tests.faults.recipes import RECIPES, ROOT, Case, check, names_key, run_cases


def test_whatever_stands_in_a_recipe_the_answer_helps(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = run_cases(300, None)
    kinds = {kind for kind, _ in found}
    assert {"value", "rename", "remove", "deep", "insert", "bytes", "override", "laughs", "size", "references"} <= kinds
    assert sum(count for (_, code), count in found.items() if code == 2) > 100, "most damage is noticed"
    assert sum(count for (_, code), count in found.items() if code == 0) > 20, "and what is harmless is not refused"


def test_every_shipped_recipe_is_damaged_and_valid_as_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(RECIPES) >= 10
    assert [check(Case(recipe.read_bytes())) for recipe in RECIPES] == [0] * len(RECIPES)


def test_what_counts_as_naming_a_key():
    assert names_key("/tmp/recipe.yaml:3: llm.AQLM.nbits\n  expected  1 to 16", ("llm", "AQLM", "nbits"))
    assert not names_key("/tmp/recipe.yaml:3: llm.AQLM.other\n  expected  1 to 16", ("llm", "AQLM", "nbits"))
    assert names_key("/tmp/recipe.yaml:3\n  expected  valid YAML", ("llm", "AQLM", "nbits"))
