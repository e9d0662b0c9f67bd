"""The table of algorithms."""

import subprocess
import sys
from pathlib import Path

import pytest

from algorithms.registry import PLANNED, config_class, find, rows
from configs.errors import UnknownAlgorithm
from configs.strict import AlgorithmParameters


def test_every_row_names_its_configuration():
    for row in rows():
        config = config_class(row.name)
        assert issubclass(config, AlgorithmParameters)
        assert config.algorithm == row.name
        assert config.stage_names
        assert config.export_formats
        assert all(find(alias) is row for alias in row.aliases)


@pytest.mark.parametrize("name", PLANNED)
def test_names_of_later_versions_are_told_apart(name):
    with pytest.raises(UnknownAlgorithm) as caught:
        config_class(name)
    assert caught.value.planned
    known = ", ".join(row.name for row in rows())
    assert str(caught.value) == f"{name} is not in this version, which has: {known}"


def test_other_names_are_unknown():
    with pytest.raises(UnknownAlgorithm, match="is no algorithm") as caught:
        config_class("AQML")
    assert not caught.value.planned
    assert caught.value.known == tuple(row.name for row in rows())


def test_configurations_import_without_torch():
    code = (
        "import sys; from algorithms.registry import config_class, rows; "
        "[config_class(row.name) for row in rows()]; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
