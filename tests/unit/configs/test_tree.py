"""YAML text as values and lines: agreement with PyYAML where a recipe can tell, and bounds on hostile text."""

import time

import pytest
import yaml

from configs.tree import MAX_DEPTH, LimitError, TreeError, plain_value, read_tree, unfold, unfolded

HONEST = """
# a comment
MODEL: "org/name"
CUDA_ID: "0,1"
numbers: {whole: 3, negative: -4, decimal: 0.5, exponent: 1.5e-3, hexadecimal: 0x1f}
flags: [true, no, On, FALSE]
nothing: [null, ~, ]
text: |
  two
  lines
quoted: ['1', "true", 'it''s']
llm:
  AQLM: &shared
    a: 1
  other:
    <<: *shared
    b: 2
"""


def test_values_are_those_of_pyyaml():
    assert read_tree(HONEST).root == yaml.safe_load(HONEST)


def test_lines_are_those_of_the_keys():
    lines = read_tree("a: 1\n\nb:\n  c: 2\n  d:\n  - x\n  - y\n").lines
    assert lines[("a",)] == 1
    assert lines[("b",)] == 3
    assert lines[("b", "c")] == 4
    assert lines[("b", "d", 1)] == 7


@pytest.mark.parametrize("text", ["007", "2024-01-01", "12:30:45", "1_000", "1e-4", "0o17", "9" * 50, "nan", "1.2.3"])
def test_what_looks_like_a_number_only_to_yaml_stays_text(text):
    assert plain_value(text) == text


def test_keys_are_text_even_where_yaml_has_another_idea():
    assert read_tree("yes: 1\n3: 2\nnull: 3\n").root == {"yes": 1, "3": 2, "null": 3}


def test_a_key_that_stands_twice_is_kept_once_and_named():
    tree = read_tree("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")
    assert tree.root == {"a": 1, "b": {"c": 1}}
    assert tree.duplicates == [(("b", "c"), 4), (("a",), 5)]


def test_an_alias_is_a_copy():
    root = read_tree("a: &x {k: 1}\nb: *x\n").root
    root["b"]["k"] = 2
    assert root["a"] == {"k": 1}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: [1, 2\n", 2, "valid YAML"),
        ("a:\n\tb: 1\n", 2, "not with tabs"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []\n", 2, "without tags"),
        ("a: !local x\n", 1, "without tags"),
        ("a: 1\n---\nb: 2\n", 2, "one recipe in a file"),
        ("a: *nobody\n", 1, "*nobody"),
        ("a: &x [*x]\n", 1, "*x"),
        ("? [a, b]\n: 1\n", 1, "a name before the colon"),
        ("a: 1\nb: \x07\n", 2, "printable"),
        ("a: [${MODEL}]\n", 1, "needs quotes"),
        ("a: {<<: 3}\n", 1, "behind <<"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_line(text, line, words):
    with pytest.raises(TreeError) as caught:
        read_tree(text)
    assert caught.value.line == line
    assert words in caught.value.expected


def _laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghi", "bcdefghij", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


@pytest.mark.parametrize("text", ["[" * 500_000, "a: " + "{b: " * 500, "- " * 5_000, _laughs(), "- 1\n" * 100_000])
def test_depth_and_size_are_bounded_while_reading(text):
    start = time.perf_counter()
    with pytest.raises(LimitError):
        read_tree(text)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("block", "values"),
    [
        ({"a.b.c": 1, "a.d": [{"x.y": 2}]}, {"a": {"b": {"c": 1}, "d": [{"x.y": 2}]}}),
        ({"a": {"b.c": 1}, "a.b": {"d": 2}}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"a.b": 1, "a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {}, "a.b": 1}, {"a": {"b": 1}}),
        ({"a.b": 1, "a": {}}, {"a": {"b": 1}}),
        ({"a.": 1, ".b": 2, "c..d": 3}, {"a.": 1, ".b": 2, "c..d": 3}),
        ({}, {}),
    ],
)
def test_keys_with_dots_are_blocks(block, values):
    assert unfold(block) == (values, [])


@pytest.mark.parametrize(
    ("block", "values", "path", "written"),
    [
        ({"a.b": 1, "a": {"b": 2}}, {"a": {"b": 1}}, ("a", "b"), ("a", "b")),
        ({"a": {"b": 1}, "a.b": True}, {"a": {"b": 1}}, ("a", "b"), ("a.b",)),
        ({"a": 1, "a.b": 2}, {"a": 1}, ("a",), ("a.b",)),
        ({"a.b": 2, "a": 1}, {"a": {"b": 2}}, ("a",), ("a",)),
        ({"a": None, "a.b": 2}, {"a": None}, ("a",), ("a.b",)),
        ({"a": {"b": {}}, "a.b": None}, {"a": {"b": {}}}, ("a", "b"), ("a.b",)),
    ],
)
def test_two_values_of_one_key_are_named(block, values, path, written):
    assert unfold(block) == (values, [(path, written)])


def test_dots_make_no_block_deeper_than_blocks_may_be():
    fits, too_deep = ".".join("a" * MAX_DEPTH), ".".join("a" * (MAX_DEPTH + 1))
    assert unfolded((fits,)) == tuple("a" * MAX_DEPTH)
    assert unfolded((too_deep,)) == (too_deep,)
    assert unfolded(("b", fits)) == ("b", fits)
    assert unfolded(("a.b", 0, "c.d")) == ("a", "b", 0, "c.d")
