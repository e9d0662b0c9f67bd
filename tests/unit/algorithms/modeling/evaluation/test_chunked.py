import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from algorithms.modeling.evaluation.chunked import chunked_perplexity


class _Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 7, generator=torch.Generator().manual_seed(0)))
        self.seen = []

    def forward(self, input_ids, use_cache):
        self.seen.append(input_ids.clone())
        return SimpleNamespace(logits=self.table[input_ids])


def by_hand(model, tokens, context):
    """The running perplexities, as the protocol's own loop makes them, in float64."""
    table = model.table.detach().double().numpy()
    log_p = table - np.log(np.exp(table).sum(-1, keepdims=True))
    loss, count, running = 0.0, 0, []
    for start in range(0, len(tokens) - context + 1, context):
        for j in range(context // 2, context - 1):
            loss -= log_p[tokens[start + j], tokens[start + j + 1]]
            count += 1
        running.append(math.exp(loss / count))
    return running


def test_both_values_by_hand():
    model, tokens = _Bigram(), torch.randint(7, (45,), generator=torch.Generator().manual_seed(1))
    found = chunked_perplexity(model, tokens, bos_token_id=0, context=8)
    running = by_hand(model, tokens.tolist(), 8)
    assert len(running) == found.chunks == 5
    assert found.value == pytest.approx(running[-1], rel=1e-6)
    assert found.mean_of_running == pytest.approx(sum(running) / 5, rel=1e-6)
    assert found.value != pytest.approx(found.mean_of_running, rel=1e-3)
    assert found.scored_tokens == 5 * 3


def test_the_first_token_alone_becomes_bos():
    model, tokens = _Bigram(), torch.arange(16) % 7
    chunked_perplexity(model, tokens, bos_token_id=6, context=8)
    seen = torch.cat(model.seen)
    assert seen[:, 0].tolist() == [6, 6]
    assert torch.equal(seen[:, 1:], tokens.view(2, 8)[:, 1:])
    assert tokens[0] == 0, "the caller's tokens stay"
    model.seen.clear()
    chunked_perplexity(model, tokens, bos_token_id=None, context=8)
    assert torch.equal(torch.cat(model.seen), tokens.view(2, 8))


def test_a_context_of_512_scores_255_targets():
    """Positions 256 to 510 predict 257 to 511: changing any other target changes nothing."""
    model, tokens = _Bigram(), torch.randint(7, (512,), generator=torch.Generator().manual_seed(2))
    found = chunked_perplexity(model, tokens, bos_token_id=0)
    assert found.scored_tokens == 255
    first = tokens.clone()
    first[:256] = 0
    assert chunked_perplexity(model, first, bos_token_id=0).value == found.value
    for place, changes in ((256, True), (511, True), (255, False)):
        other = tokens.clone()
        other[place] = (other[place] + 1) % 7
        assert (chunked_perplexity(model, other, bos_token_id=0).value != found.value) is changes
