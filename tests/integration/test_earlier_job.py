"""Two recipes, the second of which starts from the first one's output, through main.py with the real plugins, made small."""

import json

import pytest

from configs.errors import ExitCode
from main import main
from tests.support.source_tree import ROOT

SMALL = {"nsamples": 12, "model_seqlen": 64, "save_intermediate_results": "true"}
TEXTS = ("EVALUATION.max_tokens=1024", "EVALUATION.sequence_length=64")


def _arguments(folder, algorithm, *overrides):
    recipe = f"examples/text-generation/{algorithm.lower()}_quantization/config.yaml"
    small = [f"llm.{algorithm}.{key}={value}" for key, value in SMALL.items()] if algorithm == "GPTQ" else []
    return ["--yaml_path", recipe, f"USER_FOLDER={folder}", *TEXTS, *small, *overrides]


def _first(folder, *overrides):
    return _arguments(folder, "RTN", "JOB_ID=first", "EXPORT=[compressed-tensors,dense]", "llm.RTN.wbits=2", *overrides)


def _second(folder, *overrides):
    return _arguments(folder, "GPTQ", "JOB_ID=second", "EXPORT=[compressed-tensors]", *overrides)


def _job(folder, name):
    return folder / "jobs" / "Kompress" / name


def _manifest(folder, name):
    return json.loads((_job(folder, name) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user folder in which both jobs have run."""
    found = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main(_first(found)) is ExitCode.DONE
        assert main(_second(found, "MODEL=job://first/exports/dense")) is ExitCode.DONE
    return found


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_before_the_first_job_the_second_is_valid_planned_and_refused(tmp_path, capsys):
    second = _second(tmp_path, "MODEL=job://first/exports/dense")
    assert main(["validate", *second]) is ExitCode.DONE
    assert main(["plan", *second]) is ExitCode.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "MODEL job://first/exports/dense: no job of this name has run" in said
    assert not _job(tmp_path, "second").exists()
    assert main(second) is ExitCode.RECIPE
    assert "no job of this name has run" in capsys.readouterr().err


def test_the_second_starts_where_the_first_ended(folder):
    first, second = (_manifest(folder, name) for name in ("first", "second"))
    dense = _job(folder, "first") / "exports" / "dense"
    assert second["paths"]["model"] == str(dense)
    assert second["lineage"] == {"model": "examples/quickstart/model", "methods": ["RTN"], "folder": str(dense)}
    (before,) = first["evaluation"]["figures"]
    after = next(figures for figures in second["evaluation"]["figures"] if figures["corpus"] == before["corpus"])
    assert after["base_perplexity"] == pytest.approx(before["perplexity"], rel=1e-3)
    assert before["perplexity"] > 1.1 * before["base_perplexity"], "or it could not be told which of the two is meant"
    assert [entry["verdict"] for entry in second["certificate"]["formats"]] == ["passed"]


def test_the_card_tells_the_whole_way(folder):
    card = (_job(folder, "second") / "README.md").read_text()
    assert "# examples/quickstart/model, compressed with RTN, then GPTQ" in card
    assert "base_model:" not in card, "a folder is no model that the hub could link to"
    assert "examples/quickstart/model by RTN; sizes and figures before are job://first/exports/dense's |" in card


def test_coded_weights_are_refused_with_the_way_out(folder, capsys):
    assert main(_second(folder, "MODEL=job://first", "JOB_ID=third")) is ExitCode.RECIPE
    assert "Its format dense does: MODEL: job://first/exports/dense" in capsys.readouterr().err


def test_the_second_follows_the_first_ones_content(folder, capsys):
    plan = ["plan", *_second(folder, "MODEL=job://Kompress/first/exports/dense")]
    assert main(plan) is ExitCode.DONE
    assert "its input changed" not in capsys.readouterr().out
    assert main(_first(folder, "llm.RTN.wbits=4", "EVALUATION=null")) is ExitCode.DONE
    capsys.readouterr()
    assert main(plan) is ExitCode.DONE
    assert "its input changed" in " ".join(capsys.readouterr().out.split())
