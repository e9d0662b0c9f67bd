"""Which prediction counts, what a run records of it, and how the summary shows it."""

import dataclasses
import json

import pytest
import torch

from configs.errors import DataError, MemoryShortageError
from jobs.estimation import forecast as forecasts
from jobs.estimation import store
from jobs.estimation.extrapolation import Measured
from jobs.estimation.prediction import CERTIFICATE, EVALUATION, Basis, Prediction
from jobs.estimation.probe import Probed, ProbeError
from jobs.estimation.room import Room
from jobs.manifest import read_manifest
from jobs.reporting import plan_text
from jobs.runner import plan_job, run_job
from tests.support.fake_algorithm import FakeSource
from tests.support.fake_job import job_dir, journal, manifest, parts, recipe, run

EVALUATED = {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 10}}
COST = Measured(user_cpu_s=5.0, wall_s=6.0, peak_memory_bytes=7_000_000, disk_bytes=80, resident_bytes=0)
NAMES = ("calibration", "conversion", CERTIFICATE, EVALUATION)


@pytest.fixture
def probed(tmp_path, monkeypatch):
    """Probes cost 5 s a line; returns the number of them."""
    calls = []

    def probe(loaded, source, workspace):
        calls.append(source)
        return Probed(costs={2: dict.fromkeys(NAMES, COST)}, wall_s=1.5)

    monkeypatch.setattr(plan_text, "probe", probe)
    FakeSource.create(tmp_path / "user_data" / "models" / "org" / "fake")
    return calls


def plan(folder, **options):
    return plan_job(recipe(folder, envelope=EVALUATED, **options), parts=parts(folder), with_probe=True)


def recorded(folder):
    """Basis of the prediction of every stage and closing line in the manifest."""
    found = manifest(folder)
    lines = {**found["stages"], CERTIFICATE: found["certificate"], EVALUATION: found["evaluation"]}
    return {name: line["predicted"] and line["predicted"]["basis"] for name, line in lines.items() if line is not None}


def test_a_plan_shows_what_the_probe_found_and_touches_no_job(tmp_path, probed):
    found = plan(tmp_path)
    assert list(found.forecast.predictions) == list(NAMES)
    assert found.forecast.total.user_cpu_s == 20.0
    assert found.disk_bytes == 320
    assert "probe    took 1.5 s" in found.as_text()
    total = next(line for line in found.as_text().splitlines() if line.startswith("total"))
    assert total.split("  ")[0] == "total"
    assert "24.0 s" in total
    assert "7.0 MB" in total
    assert not job_dir(tmp_path).exists()
    assert journal(tmp_path) == []


def test_a_run_takes_up_what_the_probe_of_the_same_keys_found(tmp_path, probed):
    plan(tmp_path)
    result = run(tmp_path, envelope=EVALUATED)
    assert recorded(tmp_path) == dict.fromkeys(NAMES, "a probe")
    predicted = read_manifest(job_dir(tmp_path) / "manifest.json").stages["calibration"].predicted
    assert predicted == Prediction(user_cpu_s=5.0, wall_s=6.0, peak_memory_bytes=7_000_000, disk_bytes=80, basis=Basis.PROBE)
    rows = {row[0]: row for row in result.summary.stage_rows()}
    assert list(rows) == list(NAMES)
    assert rows["calibration"][3].startswith("5.0 s -> ")
    assert rows[EVALUATION][4].startswith("7.0 MB -> ")
    assert rows[CERTIFICATE][1] == "ran"
    again = run(tmp_path, envelope=EVALUATED)
    assert {row[1] for row in again.summary.stage_rows()} == {"reused"}


def test_what_a_probe_found_counts_for_the_stages_whose_key_is_the_same(tmp_path, probed):
    plan(tmp_path)
    run(tmp_path, envelope={**EVALUATED, "EXPORT": ["other"]})
    assert recorded(tmp_path)["calibration"] == "a probe"
    assert recorded(tmp_path)["conversion"] == "shapes, coarse"
    other = {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 11}}
    run(tmp_path, envelope=other, overwrite=True)
    assert recorded(tmp_path)[EVALUATION] == "shapes, coarse"


def test_without_a_probe_a_run_records_a_guess_and_then_what_it_cost_before(tmp_path):
    run(tmp_path)
    assert recorded(tmp_path) == dict.fromkeys(("calibration", "conversion", CERTIFICATE), "shapes, coarse")
    first = manifest(tmp_path)["stages"]["conversion"]
    run(tmp_path, overwrite=("conversion",))
    second = manifest(tmp_path)["stages"]["conversion"]
    assert second["predicted"]["basis"] == "an earlier run"
    assert second["predicted"]["wall_s"] == first["wall_s"]


def test_a_probe_that_fails_leaves_a_guess_and_a_note(tmp_path, monkeypatch):
    def probe(loaded, source, workspace):
        raise ProbeError("It refuses one block.")

    monkeypatch.setattr(plan_text, "probe", probe)
    FakeSource.create(tmp_path / "user_data" / "models" / "org" / "fake")
    found = plan(tmp_path)
    assert found.notes[-1] == "It refuses one block. The figures are from shapes."
    assert found.probe_s is None
    assert found.forecast.total.basis is Basis.SHAPES


def test_a_full_disk_is_said_by_the_plan_and_ends_the_run_before_its_first_stage(tmp_path, probed, monkeypatch):
    plan(tmp_path)
    monkeypatch.setattr("jobs.estimation.room.free_disk", lambda folder: 100)
    assert any(note.startswith("A run would be refused: The stages write 320 B") for note in plan(tmp_path).notes)
    with pytest.raises(DataError, match="USER_FOLDER or MODEL_PATH"):
        run(tmp_path, envelope=EVALUATED)
    assert journal(tmp_path) == []
    assert manifest(tmp_path)["run"]["status"] == "failed"


def test_too_small_a_machine_ends_the_run_before_its_first_stage(tmp_path, probed, monkeypatch):
    plan(tmp_path)
    small = Room(disk=10**12, memory=4_000_000, memory_limit=4_000_000)
    monkeypatch.setattr(Room, "here", lambda folder, device: small)
    assert any("A run would be refused" in note and "calibration 7.0 MB" in note for note in plan(tmp_path).notes)
    with pytest.raises(MemoryShortageError, match=r"than there is, 4\.0 MB"):
        run(tmp_path, envelope=EVALUATED)
    assert journal(tmp_path) == []


def test_what_cannot_be_read_is_as_good_as_nothing(tmp_path):
    prediction = Prediction(user_cpu_s=1, wall_s=2, peak_memory_bytes=3)
    keys = {"a": "1", "b": "2", "c": "3"}
    store.keep(tmp_path, keys, dict.fromkeys(keys, prediction), "cpu")
    (tmp_path / "plans" / "1.json").write_text("{")
    record = {"device": "cpu", "prediction": {**dataclasses.asdict(prediction), "basis": "a dream"}}
    (tmp_path / "plans" / "2.json").write_text(json.dumps(record))
    assert store.recall(tmp_path, {**keys, "d": "4"}, "cpu") == {"c": prediction}
    assert store.recall(tmp_path, keys, "cuda") == {}


def test_a_job_that_is_finished_expects_nothing(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(forecasts, "Machine", None)  # nothing is measured either
    loaded, collaborators = recipe(tmp_path), parts(tmp_path)
    assert run_job(loaded, parts=collaborators).summary is not None
    assert torch.get_num_threads() > 0
