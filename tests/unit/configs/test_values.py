"""Single values: what is read, and what is never silently changed into something else."""

from pathlib import Path

import pytest
from pydantic_core import PydanticCustomError

from configs.errors import shown
from configs.values import Choice, Nullable, Only, Real, Whole, flag, names, nearest_name, path, text


@pytest.mark.parametrize(("value", "number"), [(3, 3), ("3", 3), (3.0, 3), ("1e3", 1000), ("007", 7), (" 4 ", 4)])
def test_whole_numbers_in_any_spelling(value, number):
    read = Whole(1)(value)
    assert read == number
    assert type(read) is int


@pytest.mark.parametrize(
    "value", [True, False, 2.5, "2.5", "x", "", None, [], {}, 0, -1, float("inf"), float("nan"), "1_0", "9" * 99]
)
def test_what_is_no_whole_number_of_at_least_one(value):
    with pytest.raises(PydanticCustomError, match="a whole number of at least 1"):
        Whole(1)(value)


def test_whole_numbers_know_both_limits():
    assert Whole(1, 16)(16) == 16
    with pytest.raises(PydanticCustomError, match="a whole number from 1 to 16"):
        Whole(1, 16)(17)


@pytest.mark.parametrize(("value", "number"), [("1e-4", 1e-4), (1, 1.0), ("0.5", 0.5), (0.25, 0.25)])
def test_numbers_in_any_spelling(value, number):
    read = Real(above=0.0)(value)
    assert read == number
    assert type(read) is float


@pytest.mark.parametrize("value", [True, "true", None, "", "x", 0, -1.0, float("nan"), float("inf"), "inf", "1e999", 10**400])
def test_what_is_no_number_above_zero(value):
    with pytest.raises(PydanticCustomError, match="a number above 0"):
        Real(above=0.0)(value)


@pytest.mark.parametrize(
    ("reader", "inside", "outside"),
    [(Real(least=0.0, below=1.0), 0.0, 1.0), (Real(above=0.0, most=1.0), 1.0, 0.0), (Real(least=0.0, most=1.0), 1, 1.01)],
)
def test_limits_are_open_or_closed_as_named(reader, inside, outside):
    assert reader(inside) == inside
    with pytest.raises(PydanticCustomError):
        reader(outside)


@pytest.mark.parametrize("value", [1, 0, "yes", "1", None, "", 1.0, []])
def test_only_true_and_false_are_flags(value):
    with pytest.raises(PydanticCustomError, match="true or false"):
        flag(value)


def test_flags_may_come_as_text_from_the_command_line():
    assert flag("True") is True
    assert flag("false") is False


def test_null_counts_only_where_a_key_gives_it_a_meaning():
    assert Nullable(Whole(1))(None) is None
    assert Nullable(text, unset=True)("") is None
    with pytest.raises(PydanticCustomError):
        Nullable(Whole(1))("")
    with pytest.raises(PydanticCustomError):
        Whole(1)(None)


@pytest.mark.parametrize(
    ("only", "value"), [(Only(0, "zero"), False), (Only(0, "zero"), 1), (Only(False, "no"), 0), (Only(None, "null"), "x")]
)
def test_the_only_value_is_taken_literally(only, value):
    with pytest.raises(PydanticCustomError, match=only.reason):
        only(value)


def test_the_only_value_passes():
    assert Only(16, "sixteen")("16") == 16
    assert Only(None, "null")("") is None
    assert Only(False, "no")(False) is False


def test_choices_name_the_nearest():
    choice = Choice(("float32", "float16"), prefix="torch.")
    assert choice("torch.float16") == "float16"
    with pytest.raises(PydanticCustomError) as caught:
        choice("flaot16")
    assert caught.value.context["nearest"] == "float16"


def test_names_come_as_a_list_or_with_commas():
    assert names("a, b") == names(["a", "b"]) == ("a", "b")
    assert names(None) == names("") == names([]) == ()
    for bad in ("a,,b", ["a", 3], ["a", "a"], 3, {"a": 1}, [""]):
        with pytest.raises(PydanticCustomError):
            names(bad)


def test_paths_know_home_and_refuse_nothing():
    assert path("~/x") == Path.home() / "x"
    for bad in ("", None, 3, "a\0b"):
        with pytest.raises(PydanticCustomError):
            path(bad)


def test_text_keeps_whole_numbers_as_written_and_refuses_the_rest():
    assert text(7) == "7"
    for bad in (True, None, "", "  ", 1.5, [], "a\0"):
        with pytest.raises(PydanticCustomError):
            text(bad)


def test_the_nearest_name_ignores_case_and_survives_nonsense():
    assert nearest_name("NSAMPLES", ["nsamples", "nsample"]) == "nsamples"
    assert nearest_name("zzzzzz", ["nsamples"]) is None
    assert nearest_name("x" * 1_000_000, ["nsamples"]) is None


def test_values_are_shown_as_recipes_spell_them():
    assert [shown(value) for value in (None, True, "x", 3)] == ["null", "true", "'x'", "3"]
    assert len(shown("x" * 10_000)) < 100
