"""Files that are no recipes: each a RecipeError that says where and what, never anything else."""

import os

import pytest

from configs.document import MAX_BYTES, read_document
from configs.errors import RecipeError
from tests.support.recipes import SMALL, problems_of

DEEP = "llm: " + "{a: " * 100 + "1" + "}" * 100


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", None, "empty"),
        (b"# nothing but a comment\n", None, "empty"),
        (b"- a\n- b\n", 1, "a block of keys"),
        (b"just text", 1, "a block of keys"),
        (b"42", 1, "a block of keys"),
        (b"MODEL: \xff\xfe", None, "UTF-8"),
        ("MODEL: größer".encode("utf-16"), None, "UTF-8"),
        (b"MODEL: a\x00b", 1, "printable"),
        (b"MODEL: x\nllm:\n\tAQLM: {}\n", 3, "not with tabs"),
        (b"x" * (MAX_BYTES + 1), None, "at most"),
        (DEEP.encode(), 1, "inside each other"),
        (b"a: &a [*a]\n", 1, "alias"),
        (b"MODEL: [1, 2", 1, "valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, content, line, words):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_document(file)
    (problem,) = caught.value.problems
    assert problem.file == str(file)
    assert problem.line == line
    assert words in problem.expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"MODEL": }', "valid JSON"),
        ('{"MODEL": NaN}', "NaN is no number"),
        ("[" * 200_000, "JSON"),
        ('{"a":' * 100 + "1" + "}" * 100, "inside each other"),
        ('{"JOB_ID": ' + "9" * 5000 + "}", "JSON"),
        ("MODEL: yaml\n", "valid JSON"),
        ("[]", "a block of keys"),
    ],
)
def test_a_file_that_is_no_json_recipe(tmp_path, content, words):
    file = tmp_path / "recipe.json"
    file.write_text(content)
    with pytest.raises(RecipeError) as caught:
        read_document(file)
    assert words in caught.value.problems[0].expected


def test_missing_files_folders_and_names_that_no_system_takes(tmp_path):
    for path, words in (
        (tmp_path / "none.yaml", "there is none"),
        (tmp_path, "there is a folder"),
        (tmp_path / ("x" * 5000), ""),
    ):
        with pytest.raises(RecipeError, match=words):
            read_document(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(SMALL)
    file.chmod(0)
    with pytest.raises(RecipeError, match="can be read"):
        read_document(file)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xef\xbb\xbfMODEL: a\n")
    assert read_document(file).values == {"MODEL": "a"}


def test_a_key_that_stands_twice_is_a_problem(tmp_path):
    (problem,) = problems_of(SMALL + "MODEL: other\n", tmp_path)
    assert (problem.key, problem.line) == ("MODEL", 11)
    assert "line 1 already" in problem.expected


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("K=3", 3),
        ("K=1e-4", "1e-4"),
        ("K=", None),
        ("K=null", None),
        ("K=true", True),
        ("K='true'", "true"),
        ("K=a=b", "a=b"),
        ("K=a: b", "a: b"),
        ("K=[a, 1]", ["a", 1]),
        ("K={a: [1]}", {"a": [1]}),
        ("K=[broken", "[broken"),
        ("FORMAT_STRING={question}", "{question}"),
        ("FORMAT_STRING={a} and {b}", "{a} and {b}"),
        ("K.inner.deep=1", {"inner": {"deep": 1}}),
    ],
)
def test_what_an_override_means(tmp_path, override, value):
    file = tmp_path / "recipe.yaml"
    file.write_text("MODEL: a\n")
    document = read_document(file, [override])
    assert document.values[override.partition("=")[0].partition(".")[0]] == value
    assert not document.problems


def test_an_override_makes_a_block_of_null(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("llm: {AQLM: {finetune_config: null}}\n")
    document = read_document(file, ["llm.AQLM.finetune_config.lr=1"])
    assert document.values == {"llm": {"AQLM": {"finetune_config": {"lr": 1}}}}


@pytest.mark.parametrize("override", ["", "K", "=3", ".K=3", "K..a=3", "K.=3", "a b=3", "--flag", "[0]=1", "a." * 40 + "b=1"])
def test_an_override_that_makes_no_sense(tmp_path, override):
    file = tmp_path / "recipe.yaml"
    file.write_text("MODEL: a\n")
    (problem,) = read_document(file, [override]).problems
    assert problem.file == "command line"
    assert problem.key == override


DOTTED = """\
MODEL: a.b
CORPORA: {my.text: file.txt}
llm:
  X:
    one.two.three: 1
    one: {two: {four: 2}}
    five.six: 3
    five: {six: 4}
"""


def test_keys_with_dots_below_one_block_are_blocks_and_keep_their_lines(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(DOTTED)
    document = read_document(file, ["llm.X.one.two.three=7"], dotted="llm")
    assert document.values["CORPORA"] == {"my.text": "file.txt"}
    assert document.values["llm"] == {"X": {"one": {"two": {"three": 7, "four": 2}}, "five": {"six": 3}}}
    assert document.lines[("llm", "X", "one", "two", "four")] == 6
    assert document.lines[("llm", "X", "five", "six")] == 7
    assert document.lines[("llm", "X", "five")] == 7
    assert document.lines[("CORPORA", "my.text")] == 2
    (problem,) = document.problems
    assert (problem.key, problem.line, problem.value) == ("llm.X.five.six", 8, 4)
    assert "line 7: 3" in problem.expected
    assert read_document(file).values["llm"]["X"]["one.two.three"] == 1
