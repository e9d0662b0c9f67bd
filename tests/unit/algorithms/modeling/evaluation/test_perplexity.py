from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.modeling.evaluation.perplexity import compare, perplexity


class _Bigram(nn.Module):
    """Logits of the next token are a row of a table: a language model that can be worked out by hand."""

    def __init__(self, seed):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 11, generator=torch.Generator().manual_seed(seed)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])


def _log_softmax(table):
    table = table.detach().double().numpy()
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def test_perplexity_equals_float64_by_hand():
    tokens = torch.randint(11, (107,), generator=torch.Generator().manual_seed(0))
    model = _Bigram(1)
    result = perplexity(model, tokens, 10)
    log_p = _log_softmax(model.table)
    losses = [-log_p[tokens[i], tokens[i + 1]] for start in range(0, 100, 10) for i in range(start, start + 9)]
    assert result.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert (result.windows, result.scored_tokens, result.sequence_length) == (10, 90, 10)


def test_an_exact_multiple_keeps_its_last_window():
    assert perplexity(_Bigram(0), torch.zeros(40, dtype=torch.int64), 10).windows == 4


def test_comparison_equals_float64_by_hand():
    tokens = torch.randint(11, (60,), generator=torch.Generator().manual_seed(0))
    model, base = _Bigram(1), _Bigram(2)
    result = compare(model, base, tokens, 20)
    log_q, log_p = _log_softmax(model.table), _log_softmax(base.table)
    places = [tokens[i].item() for start in range(0, 60, 20) for i in range(start, start + 19)]
    kl = np.mean([(np.exp(log_p[t]) * (log_p[t] - log_q[t])).sum() for t in places])
    agreement = np.mean([log_p[t].argmax() == log_q[t].argmax() for t in places])
    assert result.kl_divergence == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreement)
    assert result.perplexity == perplexity(model, tokens, 20)
    assert result.base_perplexity == perplexity(base, tokens, 20)


def test_a_model_against_itself():
    model = _Bigram(3)
    result = compare(model, model, torch.arange(11), 5)
    assert result.kl_divergence == pytest.approx(0.0, abs=1e-7)
    assert result.top1_agreement == 1.0


def test_a_text_shorter_than_a_window_says_so():
    with pytest.raises(ValueError, match="9 tokens, less than one window of 10"):
        perplexity(_Bigram(0), torch.zeros(9, dtype=torch.int64), 10)
