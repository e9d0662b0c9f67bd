"""``MODEL: job://...``: which folder it is, and every reason why it may be none."""

import dataclasses
import json

import pytest
import torch

from configs.errors import DataError
from configs.names import job_reference
from jobs.earlier_jobs import earlier_output, lineage
from jobs.manifest import Lineage, ManifestFile, Status
from jobs.models import resolve_model
from jobs.workspace import JobLock, open_workspace
from tests.support.byte_model import tiny_llama
from tests.support.envelopes import envelope
from tests.unit.jobs.finished_jobs import finished_job


def resolve(user_folder, model, **keys):
    recipe = envelope(user_folder, MODEL=model, JOB_ID="second", **keys)
    return resolve_model(recipe, open_workspace(recipe))


def problem(user_folder, model="job://first", **keys):
    with pytest.raises(DataError) as caught:
        resolve(user_folder, model, **keys)
    text = str(caught.value)
    assert text.startswith(f"MODEL {model}: "), text
    return text


def update(job, **changes):
    ManifestFile(job / "manifest.json").update(**changes)


@pytest.mark.parametrize("model", ["job://first", "job://Kompress/first", "job://first/exports/dense"])
def test_the_folder_of_the_job_is_the_model(tmp_path, model):
    job = finished_job(tmp_path)
    source = resolve(tmp_path, model)
    assert (source.directory, source.name) == (job, model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.tensors([name])[name], tiny_llama().state_dict()[name])
    assert source.tokenizer().bos_token_id == 1


def test_a_further_format_lies_below_exports(tmp_path):
    job = finished_job(tmp_path, formats=("gptq", "dense"), coded=("gptq",))
    for model in ("job://first/exports/dense", "job://Kompress/first/exports/dense"):
        assert resolve(tmp_path, model).directory == job / "exports" / "dense"


def test_any_service_will_do_as_long_as_one_job_has_the_name(tmp_path):
    adapted = finished_job(tmp_path, service="Adapt")
    assert resolve(tmp_path, "job://first").directory == adapted
    finished_job(tmp_path)
    assert "Write job://Adapt/first or job://Kompress/first" in problem(tmp_path)
    assert resolve(tmp_path, "job://Adapt/first").directory == adapted


def test_folders_beside_those_of_the_services_are_no_jobs(tmp_path):
    finished_job(tmp_path, service="elsewhere")
    assert "no job of this name" in problem(tmp_path)


def test_a_job_that_is_not_there_names_its_neighbours(tmp_path):
    assert "no job of this name has run below" in problem(tmp_path)
    finished_job(tmp_path, "flap_prunning")
    assert "There is Kompress/flap_prunning." in problem(tmp_path, "job://flap_pruning")
    assert "There is" not in problem(tmp_path, "job://other")
    assert "MODEL_PATH" in problem(tmp_path, "job://Adapt/flap_prunning")


def test_a_job_does_not_start_from_itself(tmp_path):
    job = finished_job(tmp_path, "second")
    assert "cannot start from its own result" in problem(tmp_path, "job://second")
    assert "cannot start from its own result" in problem(tmp_path, "job://second", JOB_SERVICE="Adapt", MODEL_PATH=str(job))
    assert resolve(tmp_path, "job://second", JOB_SERVICE="Adapt").directory == job


def test_a_job_that_runs_is_waited_for(tmp_path):
    finished_job(tmp_path)
    with JobLock(open_workspace(envelope(tmp_path, JOB_ID="first"))):
        said = problem(tmp_path)
    assert "that job is running (process " in said
    assert resolve(tmp_path, "job://first")


def test_a_job_that_has_only_just_started_is_no_missing_one(tmp_path):
    workspace = open_workspace(envelope(tmp_path, JOB_ID="first"))
    with JobLock(workspace):
        assert "is running" in problem(tmp_path)


@pytest.mark.parametrize(
    ("status", "said"),
    [(Status.RUNNING, "was killed"), (Status.FAILED, "failed in its last run"), (Status.INTERRUPTED, "was interrupted")],
)
def test_a_job_that_did_not_finish(tmp_path, status, said):
    finished_job(tmp_path, status=status)
    assert said in problem(tmp_path)


def test_a_job_without_an_export(tmp_path):
    job = finished_job(tmp_path)
    update(job, published=None)
    assert "ended before its export" in problem(tmp_path)
    update(job, run=None)
    assert "no finished run" in problem(tmp_path)


def test_a_failed_certificate_counts_for_its_own_format(tmp_path):
    finished_job(tmp_path, formats=("gptq", "dense"), failed={"gptq": "logits differ"}, status=Status.CERTIFICATE_FAILED)
    assert "the certificate of its format gptq failed: logits differ" in problem(tmp_path)
    assert resolve(tmp_path, "job://first/exports/dense")


def test_files_that_are_gone_or_others(tmp_path):
    job = finished_job(tmp_path)
    (job / "README.md").write_text("A card of another length")
    assert resolve(tmp_path, "job://first")
    (job / "model.safetensors").write_bytes(b"short")
    assert "model.safetensors has 5 bytes" in problem(tmp_path)
    (job / "config.json").unlink()
    assert "config.json is missing" in problem(tmp_path)


def test_coded_weights_say_where_plain_ones_are(tmp_path):
    finished_job(tmp_path, formats=("gptq", "dense"), coded=("gptq",))
    assert "Its format dense does: MODEL: job://first/exports/dense" in problem(tmp_path)
    finished_job(tmp_path, "turned", formats=("dense", "gptq"), coded=("gptq",))
    assert "Its format dense does: MODEL: job://turned" in problem(tmp_path, "job://turned/exports/gptq")


def test_coded_weights_say_how_plain_ones_are_made(tmp_path):
    finished_job(tmp_path, algorithm="AQLM", formats=("aqlm",), coded=("aqlm",))
    said = problem(tmp_path)
    assert "format aqlm does not hold plain weights" in said
    assert "EXPORT: [aqlm, dense], then start from MODEL: job://first/exports/dense" in said
    assert "EXPORT: [aqlm, dense]" in problem(tmp_path, "job://first/exports/dense")
    assert "AQLM does not write gguf" in problem(tmp_path, "job://Kompress/first/exports/gguf")


@pytest.mark.parametrize("algorithm", ["TensorRTLLM", "OfAnotherVersion"])
def test_where_no_format_would_do(tmp_path, algorithm):
    finished_job(tmp_path, algorithm=algorithm, formats=("engine",), coded=("engine",))
    assert f"{algorithm} writes none that does" in problem(tmp_path)


def test_a_model_with_code_of_its_own_is_none_to_start_from(tmp_path):
    job = finished_job(tmp_path, formats=("ragged",))
    published = ManifestFile(job / "manifest.json").current.published
    (job / "modeling_ragged.py").write_text("x = 1")
    record = dataclasses.replace(published.files["config.json"], size=5)
    update(job, published=dataclasses.replace(published, files={**published.files, "modeling_ragged.py": record}))
    assert "does not hold plain weights" in problem(tmp_path)


def test_links_do_not_lead_out(tmp_path):
    outside = finished_job(tmp_path / "other")
    (tmp_path / "jobs" / "Kompress").mkdir(parents=True)
    (tmp_path / "jobs" / "Kompress" / "first").symlink_to(outside)
    with pytest.raises(DataError, match="a link that leads out of"):
        resolve(tmp_path, "job://first")
    job = finished_job(tmp_path, "linked", formats=("gptq", "dense"), coded=("gptq",))
    (job / "exports").rename(tmp_path / "exports")
    (job / "exports").symlink_to(tmp_path / "exports")
    with pytest.raises(DataError, match="a link that leads out of"):
        resolve(tmp_path, "job://linked/exports/dense")


def test_another_result_of_the_job_has_another_digest(tmp_path):
    finished_job(tmp_path)
    first = resolve(tmp_path, "job://first").digest
    assert resolve(tmp_path, "job://Kompress/first").digest == first
    finished_job(tmp_path, intermediate_size=12)
    assert resolve(tmp_path, "job://first").digest != first


def test_a_state_dict_takes_its_architecture_from_a_job(tmp_path):
    finished_job(tmp_path)
    state = {name: tensor + 1 for name, tensor in tiny_llama().state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    source = resolve(tmp_path, "job://first", CUSTOM_MODEL_PATH=str(tmp_path / "weights.pt"))
    assert source.directory.name.startswith("first--custom-")
    assert torch.equal(source.tensors(["model.norm.weight"])["model.norm.weight"], torch.full((8,), 2.0))


def test_the_way_to_a_model_goes_back_to_the_first_one(tmp_path):
    first = finished_job(tmp_path, algorithm="SpQR", model="org/base")
    recipe = envelope(tmp_path, MODEL="job://first", JOB_ID="second")
    once = lineage(recipe, open_workspace(recipe))
    assert once == Lineage(model="org/base", methods=("SpQR",), folder=str(first))
    second = finished_job(tmp_path, "second", algorithm="RTN", model="job://first", lineage=once)
    assert ManifestFile(second / "manifest.json").current.lineage == once
    recipe = envelope(tmp_path, MODEL="job://second", JOB_ID="third")
    twice = lineage(recipe, open_workspace(recipe))
    assert twice == Lineage(model="org/base", methods=("SpQR", "RTN"), folder=str(second))
    assert str(twice) == "org/base by SpQR, then RTN"


def test_a_model_of_no_job_has_no_lineage(tmp_path):
    finished_job(tmp_path)
    for keys in ({"MODEL": "org/base"}, {"MODEL": "job://first", "CUSTOM_MODEL_PATH": str(tmp_path)}):
        recipe = envelope(tmp_path, JOB_ID="second", **keys)
        assert lineage(recipe, open_workspace(recipe)) is None


def test_a_manifest_from_before_lineages_is_read(tmp_path):
    job = finished_job(tmp_path)
    raw = json.loads((job / "manifest.json").read_text())
    del raw["lineage"], raw["digest"]
    (job / "manifest.json").write_text(json.dumps(raw))
    reference, recipe = job_reference("job://first"), envelope(tmp_path, JOB_ID="second")
    assert earlier_output(reference, open_workspace(recipe)) == job
