"""The command line."""

from pathlib import Path

import pytest

from jobs.command_line.arguments import COMMANDS, parse_arguments
from jobs.command_line.commands import _ACTIONS, _ALONE


def files(*argv: str) -> list[tuple[str, bool]]:
    """The recipes that a command line names."""
    return [(str(file.path), file.as_json) for file in parse_arguments(argv).files]


def test_recipes_keep_their_order_over_both_options():
    assert files("--yaml_path", "a.yaml", "b.yaml") == [("a.yaml", False), ("b.yaml", False)]
    assert files("--yaml_path", "a", "--json_path", "b", "--yaml_path=c") == [("a", False), ("b", True), ("c", False)]


def test_overrides_may_stand_anywhere():
    argv = ["x.y=1", "--yaml_path", "a.yaml", "STAGES=[calibration]", "--json_path", "b.json", "K=a=b", "L="]
    arguments = parse_arguments(argv)
    assert sorted(arguments.overrides) == ["K=a=b", "L=", "STAGES=[calibration]", "x.y=1"]
    assert len(arguments.files) == 2


def test_a_file_whose_name_looks_like_an_override_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.yaml").write_text("")
    assert files("--yaml_path", "a=b.yaml") == [("a=b.yaml", False)]


def test_the_command_stands_first_and_run_is_the_default():
    assert parse_arguments(["--yaml_path", "a"]).command == "run"
    for command in ("run", "plan", "validate", "evaluate"):
        assert parse_arguments([command, "--yaml_path", "a"]).command == command
    assert parse_arguments(["evaluate", "--yaml_path", "a", "--directory", "d"]).directory == Path("d")
    assert parse_arguments(["ls"]).user_folder == Path("user_data")
    assert parse_arguments(["ls", "elsewhere"]).user_folder == Path("elsewhere")


@pytest.mark.parametrize(
    "argv", [[], ["plan"], ["--yaml_path"], ["--yml_path", "a"], ["plan", "--yaml_path", "a", "--directory", "d"], ["K=3"]]
)
def test_lines_that_make_no_sense_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(argv)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--yaml_path", "a", "validate"], "'validate' stands too late"),
        (["--yaml_path=a", "K=1", "plan"], "'plan' stands too late"),
        (["bogus", "--yaml_path", "a"], "'bogus' is no command"),
        (["a.yaml"], "'a.yaml' is no command"),
    ],
)
def test_a_command_in_the_wrong_place_is_told_where_it_belongs(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        parse_arguments(argv)
    assert caught.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert said in message
    assert f"the command comes first, before --yaml_path. The commands are {', '.join(COMMANDS)}." in message


def test_a_recipe_that_is_called_like_a_command_is_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plan").write_text("")
    assert files("--yaml_path", "plan") == [("plan", False)]


def test_an_override_without_its_equals_sign_reaches_the_loader():
    assert parse_arguments(["--yaml_path", "a", "--json_path", "b", "--", "nonsense"]).overrides == ("nonsense",)


@pytest.mark.parametrize("command", ["run", "plan", "evaluate"])
def test_quiet_may_stand_anywhere_and_only_where_something_is_said(command, capsys):
    assert parse_arguments([command, "--quiet", "--yaml_path", "a", "K=1"]).quiet
    assert parse_arguments([command, "--yaml_path", "a", "K=1", "--quiet"]).overrides == ("K=1",)
    assert not parse_arguments([command, "--yaml_path", "a"]).quiet
    with pytest.raises(SystemExit):
        parse_arguments(["validate", "--quiet", "--yaml_path", "a"])
    assert "--quiet" in capsys.readouterr().err


def test_every_command_has_something_to_do():
    assert {name for name, command in COMMANDS.items() if command.takes_recipes} == set(_ACTIONS)
    assert {name for name, command in COMMANDS.items() if not command.takes_recipes} == set(_ALONE)
