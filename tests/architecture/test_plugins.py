"""What every plugin's folder holds, and what no file of the project may speak of."""

import re

import pytest

from algorithms.registry import REGISTRY
from tests.support.source_tree import ROOT, files

PLUGIN_FILES = ("README.md", "config.py", "algorithm.py", "calibration.py")
WRITTEN = (".py", ".md", ".toml", ".yaml", ".yml", ".txt", "")
PLACES = ("main.py", "configs", "algorithms", "jobs", "tests", "examples", "user_data/README.md", ".ci")
# Places of somebody's own machine. Written in pieces, for this file is searched as well.
PRIVATE = re.compile(r"\.\./" + r"shared\b|(?<![\w.])/" + r"work/")


def private_places(text: str) -> list[str]:
    return [match.group() for match in PRIVATE.finditer(text)]


@pytest.mark.parametrize("row", REGISTRY, ids=lambda row: row.name)
@pytest.mark.parametrize("name", PLUGIN_FILES)
def test_a_plugin_has_the_files_of_every_plugin(row, name):
    folder = ROOT.joinpath(*row.config_path.partition(":")[0].split(".")).parent
    assert (folder / name).is_file(), f"{folder.relative_to(ROOT)} lacks {name}"
    assert row.class_path.rpartition(".")[0] == row.config_path.rpartition(".")[0], "configuration and code share a folder"


def test_no_file_names_a_place_outside_the_project():
    documents = [*files(*PLACES), *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt")]
    written = [path for path in documents if path.is_file() and path.suffix in WRITTEN and "data" not in path.parts]
    found = {str(path.relative_to(ROOT)): private_places(path.read_text(encoding="utf-8")) for path in written}
    assert {path: places for path, places in found.items() if places} == {}
    assert "main.py" in found


@pytest.mark.parametrize("text", ["see .." + "/shared/notes", "in /" + "work/main", "`/" + "work/x`"])
def test_such_a_place_is_seen(text):
    assert len(private_places(text)) == 1


@pytest.mark.parametrize("text", ["network/work/", "https://a.org/work/x", "the shared folder"])
def test_an_ordinary_path_is_none(text):
    assert private_places(text) == []
