"""The table of algorithms."""

import subprocess
import sys
from pathlib import Path

import pytest

from algorithms.registry import config_class, find, rows
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


def test_other_names_are_unknown():
    with pytest.raises(UnknownAlgorithm, match="is no algorithm") as caught:
        config_class("AQML")
    assert caught.value.known == tuple(row.name for row in rows())


def test_configurations_import_without_torch():
    code = (
        "import sys; from algorithms.registry import config_class, rows; "
        "[config_class(row.name) for row in rows()]; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
