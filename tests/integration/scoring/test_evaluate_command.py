"""``main.py evaluate`` without a recipe, the guide's scripts, and lm-eval's own command on what a job has written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from configs.errors import ExitCode
from main import main
from tests.support.source_tree import ROOT

SCRIPTS = "examples/text-generation/aqlm_quantization"
MODEL = "examples/quickstart/model"
OVERRIDES = [
    "EVALUATION.task_folder=examples/quickstart/tasks",
    "EVALUATION.limit=8",
    "CORPORA.wikitext2=examples/quickstart/data/evaluation/wikitext2_test.txt",
]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(*command, code=0):
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    run(
        sys.executable, "main.py", "--yaml_path", "examples/text-generation/rtn_quantization/config.yaml", f"MODEL={MODEL}",
        f"USER_FOLDER={folder}", "JOB_ID=one", "EVALUATION=null", "llm.RTN.save_intermediate_results=true",
    )  # fmt: skip
    return folder / "jobs" / "Kompress" / "one"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def options(job, tmp_path, *models, tasks):
    return [*models, "--tasks", tasks, "--results", str(tmp_path / "out"), "--cache_dir", str(job.parent / "cache"), *OVERRIDES]


def evaluate(job, tmp_path, *models, tasks):
    """In this process, which has imported everything already."""
    assert main(["evaluate", *options(job, tmp_path, *models, tasks=tasks)]) is ExitCode.DONE


def values(folder):
    found = json.loads((folder / "results.json").read_text())
    return found["ppl"], found["ppl_nyuntam_mean_of_running"]


def test_every_form_of_a_jobs_result_is_read_and_scores_alike(job, tmp_path):
    models = ("--base_model", MODEL, "--quantized_model", f"{job}/tmp/caliberation/")
    asked = options(job, tmp_path, *models, tasks="first_step,gptq_wikitext:0")
    said = run(sys.executable, f"{SCRIPTS}/evaluate.py", *asked)
    out = tmp_path / "out"
    first, base = values(out / "quantized" / "gptq_wikitext"), values(out / "base" / "gptq_wikitext")
    assert base[0] < first[0] < 1.1 * base[0], "four bits lose a little"
    assert f"Perplexity: {first[1]}" in (out / "quantized" / "gptq_wikitext" / "results.txt").read_text()
    assert (out / "quantized" / "first_step" / "results_0.txt").is_file()
    assert "first_step acc,none" in said
    record = json.loads((out / "evaluation.json").read_text())
    assert {entry["task"] for entry in record["tasks"]} == {"first_step", "gptq_wikitext"}
    for number, form in enumerate((f"{job}/tmp/converted/", str(job))):
        evaluate(job, tmp_path / str(number), "--quantized_model", form, tasks="gptq_wikitext")
        assert values(tmp_path / str(number) / "out" / "quantized" / "gptq_wikitext") == pytest.approx(first, rel=1e-6)
        assert not (tmp_path / str(number) / "out" / "base").exists()


def test_a_model_folder_alone_and_as_a_pruned_one(job, tmp_path):
    evaluate(job, tmp_path, "--base_model", MODEL, tasks="gptq_wikitext")
    evaluate(job, tmp_path, "--pruned_model", MODEL, tasks="gptq_wikitext")
    out = tmp_path / "out"
    assert values(out / "base" / "gptq_wikitext") == values(out / "pruned" / "gptq_wikitext")


def test_what_is_wrong_is_said(job, tmp_path, capsys):
    def said(*models, tasks="first_step"):
        code = main(["evaluate", *options(job, tmp_path, *models, tasks=tasks)])
        assert code is ExitCode.RECIPE
        return capsys.readouterr().err

    assert "holds no model" in said("--quantized_model", str(tmp_path))
    assert "EVALUATION names nothing" in said("--base_model", MODEL, tasks="")
    assert "there is no such folder" in said("--base_model", "./nowhere")
    assert "EVALUATION.tasks" in said("--base_model", MODEL, tasks="gsm8k:x")
    for wrong in (["--quantized_model", "a", "--pruned_model", "b"], ["--yaml_path", "x.yaml", "--tasks", "a"], []):
        with pytest.raises(SystemExit):
            main(["evaluate", *wrong])


def test_lm_evals_own_command_scores_the_output_alike(job, tmp_path):
    """The guide's other way. The client of compressed-tensors computes in float32 what our own reader does."""
    evaluate(job, tmp_path, "--quantized_model", str(job), tasks="first_step")
    ours = json.loads((tmp_path / "out" / "quantized" / "first_step" / "results_0.json").read_text())
    bin_folder = Path(sys.executable).parent
    run(
        str(bin_folder / "accelerate"), "launch", "--no-python", str(bin_folder / "lm_eval"), "--model", "hf",
        "--model_args", f"pretrained={job},dtype=float32,add_bos_token=True", "--tasks", "first_step", "--include_path",
        "examples/quickstart/tasks", "--limit", "8", "--device", "cpu", "--output_path", str(tmp_path / "theirs"),
    )  # fmt: skip
    (found,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(found.read_text())["results"]["first_step"]
    for metric in ("acc,none", "acc_norm,none"):
        assert theirs[metric] == ours["results"]["first_step"][metric]


def test_the_guides_data_set(tmp_path):
    rows = [{"question": "How many?", "answer": "Two.\n#### 2"}, {"question": "And?", "answer": "#### 3"}]
    (tmp_path / "g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ("--output", str(tmp_path / "made"), "--cache_dir", str(tmp_path / "cache"))
    said = run(sys.executable, f"{SCRIPTS}/create_dataset.py", "--dataset", str(tmp_path / "g.jsonl"), *places)
    assert "train 2 rows" in said
    table = datasets.load_from_disk(str(tmp_path / "made"))["train"]
    assert table.column_names == ["text"]
    assert table["text"][:] == ["Question: How many?\nAnswer: Two.\n#### 2", "Question: And?\nAnswer: #### 3"]
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    said = run(sys.executable, f"{SCRIPTS}/create_dataset.py", "--dataset", str(tmp_path / "other.jsonl"), *places, code=2)
    assert "no column 'question'" in said
