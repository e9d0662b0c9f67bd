"""The card's header, read back by the hub's own classes."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index

from algorithms.registry import algorithm_class, rows
from jobs.reporting.card_header import Origin, card_header, is_hub_id, origin_of, results_of
from jobs.reporting.model_card import model_card
from jobs.scoring.figures import CorpusFigures, Figures
from tests.unit.jobs.reporting.test_summary import FIGURES, STAGE, TASK, summary

RELATIONS = {"adapter", "finetune", "merge", "quantized"}  # the hub's
ALONE = CorpusFigures(corpus="c4", sequence_length=64, windows=2, tokens=126, base_perplexity=10.0)
BOTH = Figures(corpora=(FIGURES,), tasks=(TASK,))
HUB_TEXT = {"text": {"kind": "hub", "name": "Salesforce/wikitext", "subname": "wikitext-2-raw-v1"}}
LOCAL_TEXT = {"text": {"kind": "json", "name": "mine.jsonl", "files": ["mine.jsonl"]}}


def card(**changes) -> ModelCard:
    origin = Origin(
        relation="quantized", carried={"license": "mit", "language": ["en", "de"]}, datasets=("Salesforce/wikitext",)
    )
    arguments = {
        "formats": ("aqlm", "dense"),
        "recipe": "A: 1\n",
        "tags": ("compression", "aqlm"),
        "notes": (),
        "origin": origin,
    }
    return ModelCard(model_card(dataclasses.replace(summary(), **changes), **arguments))


def test_the_hub_reads_every_entry():
    data = card().data
    assert (data.base_model, data.base_model_relation) == ("org/model", "quantized")
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["compression", "aqlm"])
    assert (data.license, data.language, data.datasets) == ("mit", ["en", "de"], ["Salesforce/wikitext"])
    assert data.model_name == "out"


def test_results_are_the_figures_with_their_sequence_length():
    found = card().data.eval_results
    arguments = {"sequence_length": 256, "windows": 7, "tokens": 1785, "base_perplexity": 22.02}
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in found] == [
        ("ptb", "perplexity", 23.5),
        ("ptb", "kl_divergence", 0.0612),
        ("ptb", "top1_agreement", 0.871),
        ("gsm8k", "exact_match", 0.4444),
    ]
    assert found[-1].metric_name == "exact_match,strict-match (5-shot)"
    assert found[-1].metric_args == {
        "num_few_shot": 5, "samples": 9, "bos_added": True, "standard_error": 0.0137, "base_value": 0.5,
    }  # fmt: skip
    for result in found[:-1]:
        assert isinstance(result, EvalResult)
        assert result.task_type == "text-generation"
        assert "sequence length 256" in result.metric_name
        assert result.metric_args == arguments


def test_the_index_is_what_the_hub_s_own_classes_write():
    read = card().data
    again = ModelCardData(model_name=read.model_name, eval_results=read.eval_results)
    header = card_header(name="out", base="org/model", first_format="aqlm", tags=(), origin=Origin(), results=results_of(BOTH))
    assert eval_results_to_model_index("out", read.eval_results) == header["model-index"]
    assert ModelCard(f"---\n{again.to_yaml()}\n---\n").data.eval_results == read.eval_results


def test_without_figures_of_the_result_there_is_no_index():
    assert "model-index" not in card(figures=Figures()).content
    assert "model-index" not in card(figures=Figures(corpora=(ALONE,))).content


def test_only_a_hub_id_is_a_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "local").mkdir(parents=True)
    names = {"org/model": True, "gpt2": True, "org/local": False, "./model": False, "/models/base": False, "a/b/c": False}
    assert {name: is_hub_id(name) for name in names} == names
    assert card(model="/models/base").data.get("base_model") is None
    assert card(model="/models/base").data.get("base_model_relation") is None


@pytest.mark.parametrize(
    ("text", "carried"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\ntags: [x]\n---\n# A\n", {"license": "apache-2.0", "language": "en"}),
        (
            "---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\nlanguage:\n- en\n- fr\n---\n",
            {"license": "other", "license_name": "llama", "license_link": "LICENSE", "language": ["en", "fr"]},
        ),
        ("---\nlicense: 3\nlanguage: [en, 1]\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("# No header\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_licence_and_language_are_the_base_model_s(tmp_path, text, carried):
    (tmp_path / "README.md").write_text(text)
    assert origin_of(tmp_path, [], "quantized").carried == carried


def test_an_earlier_job_hands_its_licence_on_and_the_hub_s_data_sets_are_named(tmp_path):
    further = tmp_path / "exports" / "dense"
    further.mkdir(parents=True)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    stages = [dataclasses.replace(STAGE, tokens=tokens) for tokens in (HUB_TEXT, LOCAL_TEXT, HUB_TEXT, {}, {"data": "A"})]
    found = origin_of(further, stages, "finetune")
    assert (found.relation, found.carried, found.datasets) == ("finetune", {"license": "mit"}, ("Salesforce/wikitext",))
    assert origin_of(Path("/nonexistent/exports/x"), [], "quantized").carried == {}


def test_every_algorithm_has_a_word_of_the_hub_for_what_it_does():
    relations = {row.name: algorithm_class(row.name).relation for row in rows()}
    assert set(relations.values()) <= RELATIONS
    assert (relations["AQLM"], relations["FlapPruner"]) == ("quantized", "finetune")


@pytest.mark.parametrize(
    ("formats", "library", "loads"),
    [(("qserve", "dense"), "qserve", False), (("spqr-tiles",), "spqr_quant", False), (("gguf",), "gguf", True)],
)
def test_a_format_that_transformers_does_not_load_is_not_said_to(formats, library, loads):
    text = model_card(summary(), formats=formats, recipe="", tags=(), notes=("Served by X.",))
    assert ModelCard(text).data.library_name == library
    assert ("from_pretrained(folder" in text) == loads
    assert "Served by X." in text
    assert ("`exports/dense`" in text) == (len(formats) > 1)
