import pytest
import torch

from algorithms.modeling.evaluation.perplexity import perplexity
from configs.errors import DataError
from configs.recipe import EvaluationConfig
from jobs.evaluation import as_records, describe, from_records, load_texts, score
from tests.support.fake_algorithm import VOCABULARY, TableModel, base_table
from tests.support.fake_job import parts, quiet_terminal


def tokens(name):
    return torch.randint(VOCABULARY, (101,), generator=torch.Generator().manual_seed(len(name)))


def settings(**values):
    return EvaluationConfig(**{"perplexity": ["wikitext2", "ptb"], "sequence_length": 10, **values})


def scored(tmp_path, config, model):
    base = TableModel(base_table())
    return score(load_texts(config, tokens), base, model, parts=parts(tmp_path), progress=quiet_terminal().progress)


def test_both_models_are_scored_on_the_same_windows(tmp_path):
    model = TableModel(base_table() * 0.5)
    first, second = scored(tmp_path, settings(), model)
    assert (first.corpus, second.corpus) == ("wikitext2", "ptb")
    assert first.perplexity == pytest.approx(perplexity(model, tokens("wikitext2"), 10).value)
    assert second.base_perplexity == pytest.approx(perplexity(TableModel(base_table()), tokens("ptb"), 10).value)
    assert (first.windows, first.tokens, first.sequence_length) == (10, 90, 10)
    assert first.kl_divergence > 0
    assert first.top1_agreement == 1, "a scale changes no order"


def test_without_kl_the_perplexities_are_the_same(tmp_path):
    model = TableModel(base_table() * 0.5)
    with_kl, without = scored(tmp_path, settings(), model)[0], scored(tmp_path, settings(kl_divergence=False), model)[0]
    assert without.perplexity == pytest.approx(with_kl.perplexity)
    assert without.base_perplexity == pytest.approx(with_kl.base_perplexity)
    assert without.kl_divergence is without.top1_agreement is None


def test_the_uncompressed_model_alone(tmp_path):
    found = scored(tmp_path, settings(max_tokens=35), None)[0]
    assert found.perplexity is None
    assert found.windows == 3
    assert "sequence length 10, 3 windows, 27 tokens" in describe(found)


def test_short_texts_are_named_before_anything_is_scored():
    with pytest.raises(DataError, match=r"wikitext2 has 101 tokens; one window of sequence_length 102 needs 102"):
        load_texts(settings(sequence_length=102), tokens)
    with pytest.raises(DataError, match="of which max_tokens keeps 5"):
        load_texts(settings(max_tokens=5), tokens)


def test_a_length_beyond_the_models_own_is_warned_about(caplog):
    load_texts(settings(), tokens, positions=10)
    assert not caplog.records
    load_texts(settings(), tokens, positions=9)
    assert "longer than the 9 tokens" in caplog.text


def test_the_key_of_a_result_changes_with_model_settings_and_text():
    def key(model="m", config=None, text=tokens):
        return load_texts(config or settings(), text).key(model)

    others = [key("n"), key(None), key(config=settings(sequence_length=11)), key(text=lambda name: tokens(name) * 0)]
    assert len({key(), *others}) == 5
    assert key() == key()


def test_figures_survive_the_manifest(tmp_path):
    figures = scored(tmp_path, settings(), TableModel(base_table() * 0.5))
    assert from_records(as_records(figures)) == figures
