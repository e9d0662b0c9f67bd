"""The job, end to end, on an algorithm that needs no model: order, reuse, resume, publication, exit."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from configs.errors import CertificateError, DataError
from jobs.command_line.listing import list_jobs
from jobs.results.artifacts import describe_folder
from jobs.runner import run_job
from jobs.workspace import JobLockedError
from tests.support.fake_job import job_dir, journal, manifest, parts, recipe, run

ALL = ["calibration 0", "calibration 1", "calibration 2", "conversion"]
EVALUATED = {"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 10}}


def test_a_job_runs_its_stages_once_and_leaves_the_documented_folder(tmp_path):
    result = run(tmp_path, envelope=EVALUATED)
    assert journal(tmp_path) == ALL
    names = {path.name for path in job_dir(tmp_path).iterdir()}
    written = {"recipe.yaml", "manifest.json", ".manifest.json.copy", "metrics.jsonl", "certificate.json", "report.html", "tmp"}
    assert names == written | {"config.json", "model.safetensors", "README.md"}
    assert {path.name for path in (job_dir(tmp_path) / "tmp").iterdir()} == {"calibration", "caliberation", "converted"}
    assert (job_dir(tmp_path) / "tmp" / "caliberation" / "2.json").is_file()
    assert result.summary.figures.corpora[0].perplexity != result.summary.figures.corpora[0].base_perplexity

    run(tmp_path, envelope=EVALUATED)
    assert journal(tmp_path) == [], "everything is reused"


def test_the_manifest_says_what_was_done_with_what_at_which_cost(tmp_path):
    run(tmp_path, envelope=EVALUATED)
    found = manifest(tmp_path)
    stage = found["stages"]["calibration"]
    assert found["job"] == "Kompress/one"
    assert found["run"]["status"] == stage["status"] == "finished"
    assert set(found["versions"]) == {"bitpress", "torch", "transformers", "python", "platform", "threads", "processes"}
    assert stage["settings"] == {"blocks": 3, "scale": 0.5}
    assert stage["input_key"] == "model-1"
    assert found["stages"]["conversion"]["input_key"] == stage["key"]
    assert stage["data"] == "A, split train"
    assert stage["tokens"] == {"data": "A", "samples": [0, 1, 2, 3]}
    assert stage["wall_s"] > 0
    assert stage["peak_memory_bytes"] > 10_000_000
    folder = job_dir(tmp_path) / "tmp" / "calibration"
    assert stage["files"] == {name: {"size": r.size, "digest": r.digest} for name, r in describe_folder(folder).items()}
    assert found["evaluation"]["figures"][0]["sequence_length"] == 10
    assert found["evaluation"]["figures"][0]["windows"] == 10
    assert found["certificate"]["formats"][0]["verdict"] == "passed"
    assert yaml.safe_load((job_dir(tmp_path) / "recipe.yaml").read_text())["llm"]["FAKE"]["blocks"] == 3
    lines = [json.loads(line) for line in (job_dir(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["calibration", "conversion", "evaluation"]


def test_a_changed_setting_runs_that_stage_and_what_follows(tmp_path):
    run(tmp_path)
    journal(tmp_path)
    first = (job_dir(tmp_path) / "model.safetensors").read_bytes()
    run(tmp_path, scale=0.25)
    assert journal(tmp_path) == ALL
    assert (job_dir(tmp_path) / "model.safetensors").read_bytes() != first


def test_stages_of_other_recipes_are_not_mixed_up_when_a_setting_changes_back(tmp_path):
    run(tmp_path)
    run(tmp_path, scale=0.25)
    journal(tmp_path)
    run(tmp_path)
    assert journal(tmp_path) == ALL


@pytest.mark.parametrize(
    ("overwrite", "computed"),
    [(True, ALL), (("conversion",), ["conversion"]), (("calibration",), ALL), (("finetune",), []), (False, [])],
)
def test_overwrite_makes_stages_again(tmp_path, overwrite, computed):
    run(tmp_path)
    journal(tmp_path)
    run(tmp_path, overwrite=overwrite)
    assert journal(tmp_path) == computed


def test_two_steps_calibrate_on_one_text_and_tune_on_another(tmp_path):
    run(tmp_path, data="A", tunes=True, envelope={"STAGES": ["calibration"]})
    assert journal(tmp_path) == ALL[:3]
    assert not (job_dir(tmp_path) / "config.json").exists()
    result = run(tmp_path, data="B", tunes=True)
    assert journal(tmp_path) == ["finetune", "conversion"]
    assert "made from other data (A, split train)" in result.plan.warnings[0]
    found = manifest(tmp_path)["stages"]
    assert found["calibration"]["data"] == "A, split train"
    assert found["finetune"]["data"] == "B, split train"
    assert manifest(tmp_path)["warnings"] == ["JOB_PATH has no effect", *result.plan.warnings]
    assert found["finetune"]["input_key"] == found["calibration"]["key"]

    run(tmp_path, data="B", tunes=True)
    assert journal(tmp_path) == []
    run(tmp_path, data="B", tunes=True, overwrite=("calibration",))
    assert journal(tmp_path) == [*ALL[:3], "finetune", "conversion"]
    assert manifest(tmp_path)["stages"]["calibration"]["data"] == "B, split train"


@pytest.mark.parametrize("kept", [True, False])
def test_the_card_and_the_manifest_keep_saying_what_the_calibration_was_made_from(tmp_path, kept):
    run(tmp_path, data="A", tunes=True, envelope={"STAGES": ["calibration"]})
    assert manifest(tmp_path)["warnings"] == ["JOB_PATH has no effect"]
    for _ in range(2):  # the second time, everything is reused
        run(tmp_path, data="B", tunes=True, save_intermediate_results=kept)
        card = (job_dir(tmp_path) / "README.md").read_text()
        assert "| text for calibration | A, split train (not the text that the recipe names now) |" in card
        assert "| text for finetune | B, split train |" in card
        assert ["made from other data (A, split train)" in w for w in manifest(tmp_path)["warnings"]] == [False, True]


def test_a_stage_that_is_needed_but_not_selected_is_named_with_the_command(tmp_path):
    with pytest.raises(DataError, match=r"stage 'calibration' is needed.*STAGES=\[calibration,conversion\]"):
        run(tmp_path, envelope={"STAGES": ["conversion"]})
    assert journal(tmp_path) == []


def test_the_command_for_a_missing_stage_keeps_what_the_user_typed(tmp_path):
    typed = ("JOB_ID=rn", "STAGES=[conversion]", "TEXT_COLUMN=a b")
    loaded = replace(recipe(tmp_path, envelope={"STAGES": ["conversion"]}), overrides=typed)
    command = "python main.py --yaml_path recipe.yaml JOB_ID=rn 'TEXT_COLUMN=a b' STAGES=[calibration,conversion]"
    with pytest.raises(DataError, match=re.escape(f"Run it too: {command}")):
        run_job(loaded, parts=parts(tmp_path))


def test_a_damaged_result_is_named_and_made_again_with_what_follows(tmp_path, caplog):
    run(tmp_path)
    journal(tmp_path)
    converted = job_dir(tmp_path) / "tmp" / "converted" / "model.safetensors"
    content = bytearray(converted.read_bytes())
    content[-1] ^= 1
    converted.unlink()
    converted.write_bytes(content)
    with caplog.at_level("INFO"):
        run(tmp_path)
    assert journal(tmp_path) == ["conversion"]
    assert "damaged: model.safetensors has other content" in caplog.text

    (job_dir(tmp_path) / "tmp" / "calibration" / "1.json").unlink()
    run(tmp_path)
    assert journal(tmp_path) == ["calibration 1", "conversion"]


def test_without_intermediate_results_the_finished_job_is_still_recognised(tmp_path):
    run(tmp_path, save_intermediate_results=False, tunes=True)
    assert not (job_dir(tmp_path) / "tmp").exists()
    journal(tmp_path)
    result = run(tmp_path, save_intermediate_results=False, tunes=True)
    assert journal(tmp_path) == []
    assert [stage.action.value for stage in result.plan.stages] == ["skip", "skip", "reuse"]

    (job_dir(tmp_path) / "model.safetensors").unlink()
    run(tmp_path, save_intermediate_results=False, tunes=True)
    assert journal(tmp_path) == [*ALL[:3], "finetune", "conversion"]


def test_a_failing_stage_keeps_what_it_had_and_its_record_says_failed(tmp_path):
    with pytest.raises(RuntimeError, match="the fake stage fails"):
        run(tmp_path, fail_at=2)
    assert journal(tmp_path) == ALL[:2]
    assert manifest(tmp_path)["stages"]["calibration"]["status"] == manifest(tmp_path)["run"]["status"] == "failed"
    log = (tmp_path / "user_data" / "logs" / "Kompress" / "one" / "log.log").read_text()
    assert "Traceback" in log
    run(tmp_path)
    assert journal(tmp_path) == ALL[2:]
    assert manifest(tmp_path)["stages"]["calibration"]["attempts"] == 2


def test_a_partial_result_of_other_settings_is_not_resumed(tmp_path):
    with pytest.raises(RuntimeError):
        run(tmp_path, fail_at=2)
    journal(tmp_path)
    run(tmp_path, scale=0.25)
    assert journal(tmp_path) == ALL


def start(folder, **options):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_job", str(folder), json.dumps(options)],
        cwd=Path(__file__).resolve().parents[2],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while "waiting" not in ((folder / "journal.txt").read_text() if (folder / "journal.txt").exists() else ""):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the stage never came to its waiting place"
        time.sleep(0.05)
    return process


def test_a_killed_job_goes_on_at_the_block_and_equals_an_uninterrupted_one(tmp_path):
    process = start(tmp_path / "killed", wait_at=2)
    process.kill()
    process.wait()
    assert manifest(tmp_path / "killed")["stages"]["calibration"]["status"] == "running"
    assert journal(tmp_path / "killed") == ["calibration 0", "calibration 1", "waiting"]
    run(tmp_path / "killed")
    assert journal(tmp_path / "killed") == ["calibration 2", "conversion"]
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole")
    assert describe_folder(job_dir(tmp_path / "killed") / "tmp") == describe_folder(job_dir(tmp_path / "whole") / "tmp")


def test_overwriting_goes_on_after_a_kill_and_does_not_start_over(tmp_path):
    run(tmp_path, tunes=True)
    journal(tmp_path)
    process = start(tmp_path, tunes=True, overwrite=["calibration"], wait_at=1)
    process.kill()
    process.wait()
    assert journal(tmp_path) == ["calibration 0", "waiting"]
    run(tmp_path, tunes=True, overwrite=["calibration"])
    assert journal(tmp_path) == ["calibration 1", "calibration 2", "finetune", "conversion"]
    run(tmp_path, tunes=True, overwrite=["calibration"])
    assert journal(tmp_path) == [*ALL[:3], "finetune", "conversion"], "a finished run is overwritten again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_recorded_and_the_job_resumes(tmp_path, number):
    process = start(tmp_path, wait_at=1)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "The same command resumes where it stopped" in errors
    assert manifest(tmp_path)["stages"]["calibration"]["status"] == manifest(tmp_path)["run"]["status"] == "interrupted"
    assert manifest(tmp_path)["stages"]["calibration"]["wall_s"] > 0
    journal(tmp_path)
    run(tmp_path)
    assert journal(tmp_path) == ALL[1:]


def test_a_running_job_keeps_a_second_one_out(tmp_path):
    process = start(tmp_path, wait_at=0)
    with pytest.raises(JobLockedError, match=str(process.pid)):
        run(tmp_path)
    process.kill()
    process.wait()


def test_a_killed_rename_is_adopted(tmp_path):
    """Between the rename into place and the manifest's line, a kill leaves a finished folder that nobody recorded."""
    run(tmp_path)
    path = job_dir(tmp_path) / "manifest.json"
    raw = json.loads(path.read_text())
    raw["stages"]["calibration"] |= {"status": "running", "files": {}}
    path.write_text(json.dumps(raw))
    journal(tmp_path)
    (job_dir(tmp_path) / "tmp" / "converted" / "model.safetensors").unlink()
    run(tmp_path)
    assert journal(tmp_path) == ["conversion"], "no block is computed a second time"


def test_preflight_refuses_before_anything_runs(tmp_path):
    with pytest.raises(DataError, match="finetune cannot run here"):
        run(tmp_path, hidden=True)
    assert journal(tmp_path) == []
    run(tmp_path, hidden=True, envelope={"STAGES": ["calibration", "conversion"]})
    assert journal(tmp_path) == ALL


def test_a_missing_text_shows_before_the_first_stage(tmp_path):
    with pytest.raises(DataError, match="wikitext2 has 101 tokens; one window of sequence_length 500"):
        run(tmp_path, envelope={"EVALUATION": {"perplexity": ["wikitext2"], "sequence_length": 500}})
    assert journal(tmp_path) == []


def test_an_export_that_the_algorithm_does_not_write_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"EXPORT: FAKE does not write gguf\. It writes dense, other"):
        run(tmp_path, envelope={"EXPORT": ["gguf"]})


def test_certificate_failure_ends_the_job_after_everything_else_is_written(tmp_path):
    with pytest.raises(CertificateError, match=r"dense: the client's logits differ by at most 2.0e-01 of their deviation"):
        run(tmp_path, behaviour="wrong", save_intermediate_results=False, envelope=EVALUATED)
    found = manifest(tmp_path)
    assert found["run"]["status"] == "certificate failed"
    assert {stage["status"] for stage in found["stages"].values()} == {"finished"}
    assert [job.status for job in list_jobs(tmp_path / "user_data")] == ["certificate failed"]
    assert found["evaluation"]["figures"]
    assert json.loads((job_dir(tmp_path) / "certificate.json").read_text())["formats"][0]["verdict"] == "failed"
    assert (job_dir(tmp_path) / "model.safetensors").is_file()
    assert not (job_dir(tmp_path) / "config.json").exists(), "no whole model where the certificate failed"
    assert (job_dir(tmp_path) / "tmp" / "converted" / "config.json").is_file()
    journal(tmp_path)
    run(tmp_path, behaviour="pass", envelope=EVALUATED)
    assert journal(tmp_path) == [], "only the certificate is asked again"
    assert manifest(tmp_path)["run"]["status"] == "finished"
    assert manifest(tmp_path)["run"]["id"] != found["run"]["id"], "a verdict is an end: the next run is a new one"
    assert (job_dir(tmp_path) / "config.json").is_file()


@pytest.mark.parametrize("damage", [None, "{", "{}"])
def test_a_lost_certificate_is_written_again(tmp_path, damage):
    run(tmp_path)
    path = job_dir(tmp_path) / "certificate.json"
    before = path.read_text()
    path.unlink() if damage is None else path.write_text(damage)
    run(tmp_path, behaviour="crash")  # the client is not asked: the manifest holds its verdict
    assert path.read_text() == before


def test_what_is_said_about_an_unreadable_manifest_works(tmp_path):
    run(tmp_path)
    for name in ("manifest.json", ".manifest.json.copy"):
        (job_dir(tmp_path) / name).write_text("{")
    with pytest.raises(DataError, match="move the whole folder") as caught:
        run(tmp_path)
    assert f"{job_dir(tmp_path)} away" in str(caught.value)
    job_dir(tmp_path).rename(tmp_path / "away")
    journal(tmp_path)
    run(tmp_path)
    assert journal(tmp_path) == ALL


def test_the_certificate_needs_neither_evaluation_nor_calibration_text(tmp_path):
    """In the guide's second step the calibration is reused, and today's data may be too short for its request."""

    def too_short(*arguments):
        raise DataError("too few documents")

    run(tmp_path, envelope={"STAGES": ["calibration"]})
    result = run(tmp_path, data="B", changes={"load_tokens": too_short})
    assert [c.verdict.value for c in result.summary.certificates] == ["passed"]
    assert [c.windows for c in result.summary.certificates] == [4]


def test_a_second_format_stands_in_its_own_folder_with_its_own_verdict(tmp_path):
    result = run(tmp_path, behaviour="absent:other", envelope={"EXPORT": ["dense", "other"]})
    verdicts = {c.format: c.verdict.value for c in result.summary.certificates}
    assert verdicts == {"dense": "passed", "other": "no client on this machine"}
    assert json.loads((job_dir(tmp_path) / "exports" / "other" / "config.json").read_text()) == {"format": "other"}
    run(tmp_path, envelope={"EXPORT": ["dense"]})
    assert not (job_dir(tmp_path) / "exports").exists(), "files of an earlier publication go"
    assert (job_dir(tmp_path) / "config.json").is_file()


def test_a_foreign_model_in_the_job_folder_is_not_touched(tmp_path):
    job_dir(tmp_path).mkdir(parents=True)
    (job_dir(tmp_path) / "config.json").write_text("precious")
    with pytest.raises(DataError, match="already holds a model that this job did not write"):
        run(tmp_path)
    assert (job_dir(tmp_path) / "config.json").read_text() == "precious"


def test_the_card_and_the_summary_hold_the_same_figures(tmp_path):
    changes = parts(tmp_path)
    result = run(tmp_path, envelope=EVALUATED, changes={"terminal": changes.terminal})
    card = (job_dir(tmp_path) / "README.md").read_text()
    figures = result.summary.figures.corpora[0]
    said = f"{figures.base_perplexity:.4g} -> {figures.perplexity:.4g}"
    assert said in card
    assert said in changes.terminal.results.file.getvalue()
    assert "2.500 (codes 2.000, scales 0.500)" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "org/fake"
    log = (tmp_path / "user_data" / "logs" / "Kompress" / "one" / "log.log").read_text()
    assert log.count("JOB_PATH has no effect") == 1
    assert "calibration 3/3: block 2" in log
