"""The commands beside running a job: the plan, and figures of a model that is not made now."""

import json

import pytest

from configs.errors import DataError
from jobs.runner import evaluate_only, plan_job
from tests.support.fake_algorithm import FakeSource
from tests.support.fake_job import job_dir, journal, manifest, parts, recipe, run

EVALUATED = {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 10}}


def plan(folder, **options):
    return plan_job(recipe(folder, **options), parts=parts(folder))


def test_plan_says_what_would_run_and_creates_nothing(tmp_path):
    FakeSource.create(tmp_path / "user_data" / "models" / "org" / "fake")
    before = sorted(tmp_path.rglob("*"))
    found = plan(tmp_path)
    assert [row[1] for row in found.rows] == ["run", "run"]
    assert found.earlier_wall_s is None
    assert found.disk_bytes == 2 * 2 * (16 * 16 + 8)
    assert "calibration  run    not run yet" in found.as_text()
    assert found.commands == ()
    assert "commands" not in found.as_text()
    created = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path not in before}
    assert created == {"model"}, "only the stand-in for resolve_model wrote"


def test_plan_knows_what_is_finished_and_how_long_it_took(tmp_path):
    FakeSource.create(tmp_path / "user_data" / "models" / "org" / "fake")
    run(tmp_path)
    assert [row[1] for row in plan(tmp_path).rows] == ["reuse", "reuse"]
    again = plan(tmp_path, overwrite=("conversion",))
    assert [row[1] for row in again.rows] == ["reuse", "run"]
    assert again.earlier_wall_s == manifest(tmp_path)["stages"]["conversion"]["wall_s"]
    assert again.disk_bytes == sum(f["size"] for f in manifest(tmp_path)["stages"]["conversion"]["files"].values())
    changed = plan(tmp_path, scale=0.25)
    assert changed.rows[0][2] == "the setting scale changed"
    assert changed.rows[1][2] == "its input changed"
    assert "A run would be refused: finetune cannot run here" in plan(tmp_path, hidden=True).notes[-1]
    assert "made from other data" in plan(tmp_path, data="B").notes[-1]


def test_plan_without_the_model_says_so_and_lists_the_stages(tmp_path):
    found = plan(tmp_path, tunes=True, envelope={"STAGES": ["calibration"]})
    assert found.rows[0][:2] == ("calibration", "run")
    assert found.rows[1] == ("finetune", "skip", "not among STAGES")
    assert "org/fake is not here yet" in found.notes[-1]
    assert not (tmp_path / "model").exists(), "nothing is fetched"


def test_a_recipe_may_ask_for_figures_of_the_uncompressed_model_alone(tmp_path):
    result = run(tmp_path, only_figures=True, envelope=EVALUATED)
    assert journal(tmp_path) == []
    assert result.figures.corpora[0].perplexity is None
    found = json.loads((job_dir(tmp_path) / "evaluation.json").read_text())
    assert found["figures"][0]["base_perplexity"] == result.figures.corpora[0].base_perplexity
    assert found["figures"][0]["tokens"] == 90
    assert not (job_dir(tmp_path) / "manifest.json").exists()


def test_evaluation_without_texts_is_refused(tmp_path):
    with pytest.raises(DataError, match="EVALUATION names no texts"):
        run(tmp_path, only_figures=True)


def test_artifacts_and_job_folders_are_read_by_their_algorithm(tmp_path):
    expected = run(tmp_path, envelope=EVALUATED).figures.corpora[0]
    loaded = recipe(tmp_path, envelope=EVALUATED)
    for folder in (job_dir(tmp_path), job_dir(tmp_path) / "tmp" / "converted", job_dir(tmp_path) / "tmp" / "caliberation"):
        assert evaluate_only(loaded, folder, parts=parts(tmp_path)).figures.corpora[0].perplexity == expected.perplexity
    with pytest.raises(DataError, match=r"holds no model: no config\.json, and no finished stage of a job"):
        evaluate_only(loaded, tmp_path, parts=parts(tmp_path))


def test_a_foreign_folder_is_read_as_it_stands(tmp_path):
    source = FakeSource.create(tmp_path / "elsewhere")
    figures = evaluate_only(recipe(tmp_path, envelope=EVALUATED), source.directory, parts=parts(tmp_path)).figures.corpora[0]
    assert figures.perplexity == figures.base_perplexity
    assert figures.kl_divergence == 0
    assert figures.top1_agreement == 1
