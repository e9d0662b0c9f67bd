"""The command that says what of a model would be compressed: on folders with nothing but a config.json."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import main as program
from algorithms.modeling.families.overview import overview
from algorithms.modeling.families.table import known_families
from algorithms.modeling.source import ModelSource
from configs.errors import ExitCode
from tests.support.families.strangers import stranger_config


@pytest.mark.parametrize("family", [*known_families(), "glm", "glm4_moe"])
def test_every_family_is_shown_from_its_config_alone(tmp_path, family, capsys):
    config = stranger_config(family)
    config.save_pretrained(tmp_path)
    assert program.main(["inspect", str(tmp_path)]) is ExitCode.DONE
    said = capsys.readouterr()
    assert said.err == ""
    assert f"{family}, row {'of the architecture table' if family in known_families() else 'found by inspection'}" in said.out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json"]
    found = overview(ModelSource(tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    assert f"{found.compressed:,} of {found.total:,} parameters" in said.out
    for group in found.groups:
        for part in group:
            assert part.name in said.out


def test_a_model_that_cannot_be_compressed_ends_with_code_2(tmp_path, capsys):
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    assert program.main(["inspect", str(tmp_path)]) is ExitCode.RECIPE
    assert "Conv1D" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert program.main(["inspect", str(tmp_path / "empty")]) is ExitCode.RECIPE
    assert "no config.json" in capsys.readouterr().err
