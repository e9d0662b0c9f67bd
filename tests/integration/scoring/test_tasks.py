"""lm-eval runs for real, on the tasks that come with the quickstart, and its figures are counted again by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import DataError
from configs.names import TaskRequest
from configs.recipe import EvaluationConfig
from jobs.scoring.harness import Harness

QUICKSTART = Path("examples/quickstart")
TASKS = QUICKSTART / "tasks"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(QUICKSTART / "model")


def harness(cache, **settings):
    return Harness(settings=EvaluationConfig(**{"task_folder": str(TASKS), "limit": 24, **settings}), cache_dir=cache)


def log_likelihood(model, tokenizer, context, continuation, bos):
    before = tokenizer(context, add_special_tokens=bos)["input_ids"]
    ids = tokenizer(context + continuation, add_special_tokens=bos)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[place - 1, ids[place]].item() for place in range(len(before), len(ids)))


def test_accuracy_is_a_direct_count(model, tokenizer, tmp_path):
    request = TaskRequest(name="first_step")
    runner = harness(tmp_path / "cache")
    runner.check([request])
    (result,) = runner.run(request, model, tokenizer, tmp_path / "out")
    rows = [json.loads(line) for line in (TASKS / "first_step.jsonl").read_text().splitlines()][:24]
    right = right_by_length = 0
    for row in rows:
        context = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, f" {choice}", True) for choice in row["choices"]]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right += max(range(4), key=scores.__getitem__) == row["label"]
        right_by_length += max(range(4), key=by_length.__getitem__) == row["label"]
    assert result.metrics["acc,none"][0] == right / 24
    assert result.metrics["acc_norm,none"][0] == right_by_length / 24
    assert (result.samples, result.bos_added) == (24, True)
    written = json.loads((tmp_path / "out" / "results_0.json").read_text())
    assert written["results"]["first_step"]["acc,none"] == right / 24
    assert "|first_step|" in (tmp_path / "out" / "results_0.txt").read_text().replace(" ", "")
    assert len((tmp_path / "out" / "samples_0.jsonl").read_text().splitlines()) == 24


def test_bos_is_the_recipes_choice_and_moves_the_result(model, tokenizer, tmp_path):
    def first_score(**settings):
        folder = tmp_path / str(settings)
        (result,) = harness(tmp_path / "cache", limit=1, **settings).run(
            TaskRequest(name="first_step"), model, tokenizer, folder
        )
        (sample,) = map(json.loads, (folder / "samples_0.jsonl").read_text().splitlines())
        return result.bos_added, float(sample["filtered_resps"][0][0])

    row = json.loads((TASKS / "first_step.jsonl").read_text().splitlines()[0])
    context = f"Question: {row['question']}\nAnswer:"
    for settings, bos in (({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)):
        added, score = first_score(**settings)
        assert added is bos
        assert score == pytest.approx(log_likelihood(model, tokenizer, context, f" {row['choices'][0]}", bos), rel=1e-4)


def test_generated_answers_are_counted(model, tokenizer, tmp_path):
    """Half of the targets are what the model writes by itself."""
    prompts = [f"The {word}" for word in ("river", "king", "city", "war")]
    rows = []
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
        rows.append({"prompt": prompt, "target": tokenizer.decode(written).strip() if number % 2 else "nothing of it"})
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks" / "echo.yaml").write_text(
        f"task: echo\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{target}}'\n"
        "generation_kwargs: {until: ['@@'], do_sample: false, max_gen_toks: 6}\n"
        "filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    runner = harness(tmp_path / "cache", task_folder=str(tmp_path / "tasks"))
    (result,) = runner.run(TaskRequest(name="echo", num_fewshot=0), model, tokenizer, tmp_path / "out")
    assert result.metrics["exact_match,strip"][0] == 0.5


def test_examples_stand_before_a_question(model, tokenizer, tmp_path):
    request = TaskRequest(name="gsm8k_quickstart", num_fewshot=2)
    (result,) = harness(tmp_path / "cache", limit=2).run(request, model, tokenizer, tmp_path / "out")
    assert result.num_fewshot == 2
    for line in (tmp_path / "out" / "samples_2.jsonl").read_text().splitlines():
        assert json.loads(line)["arguments"][0][0].count("Question:") == 3


def test_what_cannot_be_run_is_named_beforehand(tmp_path):
    with pytest.raises(DataError, match=r"task_folder: .*nowhere is no folder"):
        harness(tmp_path, task_folder=str(tmp_path / "nowhere")).check([TaskRequest(name="first_step")])
    with pytest.raises(DataError, match=r"lm-eval has no task 'gsm8kk'; did you mean 'gsm8k'\?"):
        harness(tmp_path).check([TaskRequest(name="gsm8kk")])
    shutil.copytree(TASKS, tmp_path / "tasks")
    task = tmp_path / "tasks" / "first_step.yaml"
    task.write_text(task.read_text().replace("first_step.jsonl", "gone.jsonl"))
    with pytest.raises(DataError, match=r"first_step cannot be run: .*gone\.jsonl"):
        harness(tmp_path / "cache", task_folder=str(tmp_path / "tasks")).check([TaskRequest(name="first_step")])
