"""The envelope: each key's forms, and the checks between keys."""

import pytest

from configs.names import JobReference
from tests.support.recipes import SMALL, load, problems_of


def expectation(tmp_path, *overrides: str) -> str:
    """What was expected by the one problem that the overrides cause."""
    (problem,) = problems_of(SMALL, tmp_path, *overrides)
    assert problem.key in overrides[-1]
    return problem.expected


@pytest.mark.parametrize(
    "job_id",
    [
        "../x",
        "/abs",
        "a/../../b",
        "~",
        "~root/x",
        ".",
        "C:\\x",
        "a\\b",
        "a/b",
        "a/",
        "quickstart/tmp",
        "[a]",
        "true",
        "1.5",
        "null",
    ],
)
def test_a_job_cannot_leave_the_user_folder(tmp_path, job_id):
    assert expectation(tmp_path, f"JOB_ID={job_id}")


@pytest.mark.parametrize(("job_id", "name"), [("7", "7"), ("2024-01-01", "2024-01-01"), ("..x", "..x")])
def test_job_names_that_stay(tmp_path, job_id, name):
    assert load(SMALL, tmp_path, f"JOB_ID={job_id}").recipe.job_id == name


def test_models_and_data_sets_are_names_or_open_paths(tmp_path):
    for model in ("org/name", "/abs/model", "../models/tiny", "./x", "models/tiny"):
        assert load(SMALL, tmp_path, f"MODEL={model}").recipe.model == model
    for name in ("org/name", "gsm8k", "../calib.pt", "/abs/tokens.pth"):
        assert load(SMALL, tmp_path, f"DATASET_NAME={name}").recipe.dataset_name == name
    assert "leading /" in expectation(tmp_path, "MODEL=org/../../x")
    assert "DATA_PATH" in expectation(tmp_path, "DATASET_NAME=../secret")
    assert "DATA_PATH" in expectation(tmp_path, "DATASET_NAME=/abs/folder")


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        ("job://flap_pruning", JobReference(job_id="flap_pruning")),
        ("job://7", JobReference(job_id="7")),
        ("job://Kompress/a b", JobReference(service="Kompress", job_id="a b")),
        ("job://adapt/exports", JobReference(service="adapt", job_id="exports")),
        ("job://a/exports/dense", JobReference(job_id="a", format="dense")),
        ("job://Adapt/a/exports/auto-round", JobReference(service="Adapt", job_id="a", format="auto-round")),
        ("org/job", None),
        ("./job:x", None),
    ],
)
def test_a_model_may_be_another_job_s_output(tmp_path, model, reference):
    recipe = load(SMALL, tmp_path, f"MODEL={model}").recipe
    assert (recipe.model, recipe.model_job) == (model, reference)
    assert reference is None or str(reference) == model


@pytest.mark.parametrize(
    "model",
    [
        "job://",
        "job:///",
        "job:first",
        "job:/first",
        "JOB://first",
        "job:///etc",
        "job://..",
        "job://.",
        "job://~",
        "job://a/",
        "job://Kompress/..",
        "job://../Kompress/a",
        "job://kompres/a",
        "job://a/b/c",
        "job://a/exports/",
        "job://a/exports/..",
        "job://a/tmp/converted",
        "job://a/exports/dense/x",
        "job://Kompress/a/exports",
        "job://a\\b",
    ],
)
def test_what_names_no_job(tmp_path, model):
    assert expectation(tmp_path, f"MODEL={model}").startswith("job://JOB_ID, job://JOB_SERVICE/JOB_ID")


def test_references_and_other_paths_keep_apart(tmp_path):
    assert load(SMALL, tmp_path, "MODEL=job://${JOB_SERVICE}/first", "JOB_SERVICE=Adapt").recipe.model == "job://Adapt/first"
    assert "MODEL: job://first" in expectation(tmp_path, "CUSTOM_MODEL_PATH=job://first")


def test_the_service_is_known_in_any_case_and_kept_as_written(tmp_path):
    assert load(SMALL, tmp_path, "JOB_SERVICE=KomPress").recipe.job_folder.parts[-2:] == ("KomPress", "trial")
    assert load(SMALL, tmp_path, "MODEL_PATH=out").recipe.job_folder.name == "out"
    assert expectation(tmp_path, "JOB_SERVICE=Kompres") == "Kompress or Adapt"


def test_empty_text_means_unset(tmp_path):
    keys = ("CUSTOM_MODEL_PATH", "DATASET_SUBNAME", "DATA_PATH", "FORMAT_STRING", "CACHE_PATH", "LOGGING_PATH", "MODEL_PATH")
    recipe = load(SMALL, tmp_path, *(f"{key}=''" for key in keys)).recipe
    assert [recipe.model_dump(by_alias=True)[key] for key in keys] == [None] * len(keys)


@pytest.mark.parametrize(
    ("value", "devices"), [("0", (0,)), ("'0,1,2'", (0, 1, 2)), ("[3, 1]", (3, 1)), ("", ()), ("3,2", (3, 2))]
)
def test_device_numbers_keep_their_order(tmp_path, value, devices):
    assert load(SMALL, tmp_path, f"CUDA_ID={value}").recipe.cuda_id == devices


@pytest.mark.parametrize("value", ["a", "0,0", "-1", "true", "[[0]]", "0.5", "{a: 1}"])
def test_what_is_no_device(tmp_path, value):
    assert "device numbers" in expectation(tmp_path, f"CUDA_ID={value}")


def test_several_columns_need_a_template_of_those_columns(tmp_path):
    columns = "TEXT_COLUMN=question,answer"
    good = load(SMALL, tmp_path, columns, "FORMAT_STRING=Q: {question} {{literal}} A: {answer}").recipe
    assert good.text_column == ("question", "answer")
    missing = problems_of(SMALL, tmp_path, columns)
    assert [problem.key for problem in missing] == ["FORMAT_STRING"]
    for template in ("{nope}", "{}", "{0}", "{question.__class__}", "{question[0]}", "{question", "plain text"):
        assert expectation(tmp_path, columns, f"FORMAT_STRING={template}")


def test_stages_and_formats_are_those_of_the_algorithm(tmp_path):
    assert load(SMALL, tmp_path, "STAGES=[conversion]", "EXPORT=[dense, aqlm]").recipe.export == ("dense", "aqlm")
    assert load(SMALL, tmp_path, "STAGES=null").recipe.stages is None
    assert "calibration, finetune, conversion" in expectation(tmp_path, "STAGES=[convert]")
    assert "aqlm, dense" in expectation(tmp_path, "EXPORT=[awq]")
    assert "null for all" in expectation(tmp_path, "STAGES=[]")
    assert "without repetitions" in expectation(tmp_path, "EXPORT=[aqlm, aqlm]")


def test_texts_to_evaluate_on_are_known_or_local(tmp_path):
    local = "CORPORA={novel: {train: a.txt, test: b.txt}, ptb: c.txt}"
    recipe = load(SMALL, tmp_path, local, "EVALUATION={perplexity: [novel, ptb, c4], max_tokens: 1e4}").recipe
    assert recipe.evaluation.corpora == ("novel", "ptb", "c4")
    assert recipe.evaluation.max_tokens == 10_000
    assert str(recipe.corpora["novel"]["test"]) == "b.txt"
    (unknown,) = problems_of(SMALL, tmp_path, "EVALUATION={perplexity: [novel]}")
    assert unknown.key == "EVALUATION.perplexity"
    assert load(SMALL, tmp_path, "EVALUATION=null").recipe.evaluation is None


def test_tasks_have_a_number_of_examples_or_none(tmp_path):
    evaluation = load(SMALL, tmp_path, "EVALUATION={tasks: 'gsm8k:5, gptq_wikitext'}").recipe.evaluation
    assert [(request.name, request.num_fewshot) for request in evaluation.requests] == [("gsm8k", 5), ("gptq_wikitext", None)]
    assert not evaluation.is_empty
    assert load(SMALL, tmp_path, "EVALUATION={sequence_length: 5}").recipe.evaluation.is_empty
    for wrong in ("'gsm8k:five'", "'gsm8k:'", "'../x'", "'a b'", "'gsm8k:-1'", "'gsm8k:5,gsm8k:5'", "{gsm8k: 5}", "'a:99999'"):
        (problem,) = problems_of(SMALL, tmp_path, f"EVALUATION={{tasks: [{wrong}]}}")
        assert problem.key == "EVALUATION.tasks", wrong


def test_no_evaluation(tmp_path):
    assert load(SMALL, tmp_path, "EVALUATION=null").recipe.evaluation is None


@pytest.mark.parametrize("value", ["[a]", "{'a b': x}", "{../a: x}", "{a: {all: x}}", "{a: 3}", "{a: {train: null}}"])
def test_what_is_no_local_text(tmp_path, value):
    (problem,) = problems_of(SMALL, tmp_path, f"CORPORA={value}")
    assert (problem.file, problem.key.partition(".")[0]) == ("command line", "CORPORA")


@pytest.mark.parametrize(
    ("key", "value"), [("NUM_PROCESSES", "0"), ("TRUST_REMOTE_CODE", "1"), ("TASK", "vision"), ("SPLIT", "null")]
)
def test_wrong_single_values(tmp_path, key, value):
    assert expectation(tmp_path, f"{key}={value}")
