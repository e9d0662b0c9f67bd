"""Ranges of requirements.txt, compared with versions that are known."""

import pytest

from jobs.command_line.requirements import check_requirements, installed_version

TEXT = """\
# Tensors
torch>=2.11,<2.14
numpy>=2.4,<3  # with a comment
Old-Package>=1.2,<2

# Tests and style: more
pytest>=9.2,<10
"""


@pytest.mark.parametrize(
    ("version", "met"),
    [("2.13.0+cpu", True), ("2.11", True), ("2.10.9", False), ("2.14.0", False), ("2.12.0rc1", True), (None, False)],
)
def test_a_version_is_held_against_its_range(tmp_path, version, met):
    file = tmp_path / "requirements.txt"
    file.write_text("torch>=2.11,<2.14\n")
    (found,) = check_requirements(file, lambda name: version)
    assert found.is_met == met
    assert (found.problem is None) == met
    assert met or ">=2.11" in found.problem


def test_the_lines_behind_the_mark_are_for_tests_alone(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(TEXT)
    versions = {"torch": "2.12.1", "numpy": "1.26.4", "pytest": "9.2.0"}
    found = check_requirements(file, versions.get)
    assert [(f.name, f.found, f.is_met, f.is_required) for f in found] == [
        ("torch", "2.12.1", True, True),
        ("numpy", "1.26.4", False, True),
        ("Old-Package", None, False, True),
        ("pytest", "9.2.0", True, False),
    ]
    assert "not installed" in found[2].problem


def test_our_own_file_is_read_and_met():
    found = check_requirements()
    assert {"torch", "transformers", "pydantic", "wandb"} <= {f.name for f in found if f.is_required}
    assert {"pytest", "ruff", "jsonschema"} <= {f.name for f in found if not f.is_required}
    assert [f.name for f in found if f.problem] == []
    assert installed_version("no-such-package-anywhere") is None
