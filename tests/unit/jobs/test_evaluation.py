import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from algorithms.modeling.evaluation.chunked import chunked_perplexity
from algorithms.modeling.evaluation.perplexity import perplexity
from configs.errors import DataError
from configs.recipe import EvaluationConfig
from jobs.evaluation import Examiner, IncompleteEvaluationError, Memory, Sources, Subject, file_memory, load_questions
from jobs.execution.collaborators import Collaborators
from jobs.scoring.figures import TaskResult, as_records, describe, describe_task, from_records
from tests.support.fake_algorithm import VOCABULARY, TableModel, base_table
from tests.support.fake_job import parts, quiet_terminal


def tokens(name):
    return torch.randint(VOCABULARY, (101,), generator=torch.Generator().manual_seed(len(name)))


def settings(**values):
    return EvaluationConfig(**{"perplexity": ["wikitext2", "ptb"], "sequence_length": 10, **values})


CHUNKED_TEXT = torch.randint(VOCABULARY, (1100,), generator=torch.Generator().manual_seed(3))


def asked(config, text=tokens, positions=None):
    tokenizer = SimpleNamespace(bos_token_id=0, chat_template=None)
    sources = Sources(corpus=text, chunked=lambda: CHUNKED_TEXT, cache_dir=Path(), tokenizer=lambda: tokenizer)
    return load_questions(config, FAKES, sources, positions)


class FakeHarness:
    """Answers tasks with the mean of a model's table."""

    def __init__(self, settings, cache_dir):
        self.settings = settings

    def check(self, requests):
        if any(request.name == "unknown" for request in requests):
            raise DataError("no such task")
        return {str(request): asked_by.get(request.name, "") for request in requests}

    def run(self, request, model, tokenizer, folder):
        if request.name == "broken":
            raise DataError("broken cannot be run")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results_5.json").write_text("{}")
        runs.append((request.name, folder.parent.name))
        metrics = {"acc,none": (model.table.abs().mean().item(), 0.01)}
        return (TaskResult(task=request.name, num_fewshot=request.num_fewshot, samples=7, metrics=metrics, bos_added=True),)


FAKES = Collaborators(harness=FakeHarness)
runs = []
asked_by = {}


@pytest.fixture(autouse=True)
def _no_runs():
    runs.clear()
    asked_by.clear()


def examiner(tmp_path, config, **changes):
    values = {"parts": parts(tmp_path, harness=FakeHarness), "progress": quiet_terminal().progress}
    values |= {"folder": tmp_path / "evaluation", "cache_dir": tmp_path, "tokenizer": lambda: SimpleNamespace(bos_token_id=0)}
    return Examiner(**{"questions": asked(config), **values, **changes})


BASE_MODEL = Subject(key="base", label="base", open=lambda: TableModel(base_table()))
HALF = Subject(key="half", label="quantized", open=lambda: TableModel(base_table() * 0.5))


def scored(tmp_path, config, model, **changes):
    return examiner(tmp_path, config, **changes).score(BASE_MODEL, model)


def test_both_models_are_scored_on_the_same_windows(tmp_path):
    first, second = scored(tmp_path, settings(), HALF).corpora
    assert (first.corpus, second.corpus) == ("wikitext2", "ptb")
    model = TableModel(base_table() * 0.5)
    assert first.perplexity == pytest.approx(perplexity(model, tokens("wikitext2"), 10).value)
    assert second.base_perplexity == pytest.approx(perplexity(TableModel(base_table()), tokens("ptb"), 10).value)
    assert (first.windows, first.tokens, first.sequence_length) == (10, 90, 10)
    assert first.kl_divergence > 0
    assert first.top1_agreement == 1, "a scale changes no order"
    assert first.kl_interval[0] < first.kl_divergence < first.kl_interval[1]
    assert first.ratio_interval[0] < first.perplexity / first.base_perplexity < first.ratio_interval[1]


def test_without_kl_the_perplexities_are_the_same(tmp_path):
    with_kl, without = (scored(tmp_path, config, HALF).corpora[0] for config in (settings(), settings(kl_divergence=False)))
    assert without.perplexity == pytest.approx(with_kl.perplexity)
    assert without.base_perplexity == pytest.approx(with_kl.base_perplexity)
    assert without.kl_divergence is without.top1_agreement is None


def test_the_uncompressed_model_alone(tmp_path):
    found = scored(tmp_path, settings(max_tokens=35), None).corpora[0]
    assert found.perplexity is None
    assert found.windows == 3
    assert "sequence length 10, 3 windows, 27 tokens" in describe(found)


def test_short_texts_are_named_before_anything_is_scored():
    with pytest.raises(DataError, match=r"wikitext2 has 101 tokens; one window of sequence_length 102 needs 102"):
        asked(settings(sequence_length=102))
    with pytest.raises(DataError, match="of which max_tokens keeps 5"):
        asked(settings(max_tokens=5))


def test_a_length_beyond_the_models_own_is_warned_about(caplog):
    asked(settings(), positions=10)
    assert not caplog.records
    asked(settings(), positions=9)
    assert "longer than the 9 tokens" in caplog.text


def test_the_key_of_a_result_changes_with_model_settings_and_text():
    def key(model="m", config=None, text=tokens):
        return asked(config or settings(), text).key(model)

    others = [key("n"), key(None), key(config=settings(sequence_length=11)), key(text=lambda name: tokens(name) * 0)]
    assert len({key(), *others}) == 5
    assert key() == key()


def test_figures_survive_the_manifest(tmp_path):
    figures = scored(tmp_path, settings(tasks=["gsm8k:5"]), HALF)
    assert from_records(json.loads(json.dumps(as_records(figures)))) == figures


def test_figures_of_an_older_manifest_are_read():
    record = {"corpus": "ptb", "sequence_length": 8, "windows": 1, "tokens": 7, "base_perplexity": 2.0, "perplexity": None}
    assert from_records({"figures": [record]}).corpora[0].base_perplexity == 2.0


def test_tasks_of_both_models_stand_side_by_side(tmp_path):
    found = scored(tmp_path, settings(perplexity=[], tasks=["gsm8k:5", "arc"]), HALF).tasks
    assert [(f.task, f.num_fewshot, f.metric) for f in found] == [("gsm8k", 5, "acc,none"), ("arc", None, "acc,none")]
    mean = base_table().abs().mean().item()
    assert (found[0].base_value, found[0].value) == pytest.approx((mean, mean / 2))
    assert runs == [("gsm8k", "base"), ("gsm8k", "quantized"), ("arc", "base"), ("arc", "quantized")]
    assert "gsm8k acc,none" in describe_task(found[0])
    assert "5 examples, 7 samples, with BOS" in describe_task(found[0])


def test_a_task_that_is_not_there_is_said_before_anything_is_scored():
    with pytest.raises(DataError, match="no such task"):
        asked(settings(tasks=["unknown"]))


def test_gptq_wikitext_has_both_values_and_writes_what_nyuntam_prints(tmp_path):
    found = scored(tmp_path, settings(perplexity=[], tasks=["gptq_wikitext:0"]), HALF).tasks
    expected = chunked_perplexity(TableModel(base_table() * 0.5), CHUNKED_TEXT, 0)
    assert {f.metric: f.value for f in found} == {
        "ppl": expected.value,
        "ppl_nyuntam_mean_of_running": expected.mean_of_running,
    }
    folder = tmp_path / "evaluation" / "quantized" / "gptq_wikitext"
    assert (folder / "results.txt").read_text() == f"Perplexity: {expected.mean_of_running}\n"
    written = json.loads((folder / "results.json").read_text())
    assert (written["ppl"], written["n_chunks"], written["bos_token_id"]) == (expected.value, expected.chunks, 0)
    assert (tmp_path / "evaluation" / "base" / "gptq_wikitext" / "results.txt").is_file()


def test_what_is_known_is_not_measured_again(tmp_path):
    kept = {}

    def keep(key, subject, record):
        assert subject in ("base", "half")
        kept[key] = json.loads(json.dumps(record))

    config = settings(tasks=["gsm8k:5", "gptq_wikitext"])
    first = scored(tmp_path, config, HALF, memory=Memory(keep=keep))
    runs.clear()
    closed = [Subject(key=s.key, label=s.label, open=lambda: pytest.fail("opened")) for s in (BASE_MODEL, HALF)]
    again = examiner(tmp_path, config, memory=Memory(known=kept)).score(*closed)
    assert again == first
    assert not runs
    other = Subject(key="other", label="quantized", open=HALF.open)
    examiner(tmp_path / "b", config, memory=Memory(known=kept)).score(BASE_MODEL, other)
    assert ("gsm8k", "quantized") in runs


def test_tasks_whose_files_are_gone_run_again(tmp_path):
    kept = {}
    config = settings(perplexity=[], tasks=["gsm8k:5"])
    scored(tmp_path, config, HALF, memory=Memory(keep=lambda key, subject, record: kept.update({key: record})))
    shutil.rmtree(tmp_path / "evaluation" / "quantized")
    runs.clear()
    scored(tmp_path, config, HALF, memory=Memory(known=kept))
    assert runs == [("gsm8k", "quantized")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"asked": "a"}, {"asked": "b"}),
        ({"limit": 3}, {"limit": 4}),
        ({}, {"add_bos_token": True}),
    ],
)
def test_what_shapes_a_result_is_measured_again(tmp_path, first, second):
    """Another arithmetic, another content of a task's own file, another number of samples."""
    kept, opened = {}, []

    def opening():
        opened.append(1)
        return TableModel(base_table())

    def once(asked="", **settings_):
        asked_by["own"] = asked
        runs.clear()
        opened.clear()
        base = Subject(key="base", label="base", open=opening)
        memory = Memory(known=dict(kept), keep=lambda key, subject, record: kept.update({key: record}))
        examiner(tmp_path, settings(perplexity=["ptb"], tasks=["own"], **settings_), memory=memory).score(base, None)
        return bool(runs), bool(opened)

    assert once(**first) == (True, True)
    assert once(**first) == (False, False)
    assert once(**second)[0]


def test_a_task_that_fails_costs_nothing_else(tmp_path):
    with pytest.raises(IncompleteEvaluationError, match="broken cannot be run") as failure:
        scored(tmp_path, settings(tasks=["broken", "gsm8k:5"]), HALF)
    figures = failure.value.figures
    assert [f.corpus for f in figures.corpora] == ["wikitext2", "ptb"]
    assert [f.task for f in figures.tasks] == ["gsm8k"]


def test_an_evaluation_outside_a_job_remembers_in_a_file(tmp_path):
    place = tmp_path / "progress.json"
    config = settings(tasks=["gsm8k:5"])
    first = scored(tmp_path, config, HALF, memory=file_memory(place))
    runs.clear()
    assert scored(tmp_path, config, HALF, memory=file_memory(place)) == first
    assert not runs
    place.write_text("{")
    scored(tmp_path, config, HALF, memory=file_memory(place))
    assert runs, "a damaged file is nothing known"


def test_a_chat_template_that_is_not_there_is_said_beforehand():
    with pytest.raises(DataError, match="has no chat template"):
        asked(settings(tasks=["gsm8k"], apply_chat_template=True))


def test_a_model_alone_is_scored_on_tasks_as_itself(tmp_path):
    found = examiner(tmp_path, settings(tasks=["gsm8k"])).score(None, HALF)
    assert found.tasks[0].base_value is None
    assert found.tasks[0].value is not None
    assert found.corpora[0].base_perplexity == pytest.approx(
        perplexity(TableModel(base_table() * 0.5), tokens("wikitext2"), 10).value
    )


def test_every_result_is_noted(tmp_path):
    noted = []
    scored(tmp_path, settings(tasks=["gsm8k:5"]), HALF, note=noted.append)
    assert [record.get("corpus") or record["task"] for record in noted] == ["wikitext2", "ptb", "gsm8k"]
