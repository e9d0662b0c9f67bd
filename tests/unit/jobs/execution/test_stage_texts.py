import logging
from types import SimpleNamespace

import torch
from torch import nn

from algorithms.base import StageSpec, TokenRequest
from configs.errors import DataError
from jobs.datasets import UNSCORED
from jobs.execution.stage_texts import MOST_TOKENS, evaluation_on, stage_texts
from tests.support.envelopes import envelope


def spec(*names):
    request = TokenRequest(num_samples=None, sequence_length=8, seed=0)
    return StageSpec(name="finetune", run=lambda *_: None, directory="d", kind="k", tokens=request, evaluates=names)


def corpus_tokens(name, recipe, source, workspace, *, split="test"):
    assert split == UNSCORED
    if name == "absent":
        raise DataError("no such file")
    return torch.arange({"long": 100_000, "short": 7}[name])


def test_texts_are_cut_and_what_cannot_be_read_is_left_out_with_the_reason(tmp_path, caplog):
    parts = SimpleNamespace(corpus_tokens=corpus_tokens)
    with caplog.at_level(logging.WARNING):
        found = stage_texts(spec("long", "absent", "gsm8k:5", "short"), envelope(tmp_path), None, None, parts)
    assert {name: tokens.numel() for name, tokens in found.items()} == {"long": MOST_TOKENS}
    said = " / ".join(record.getMessage() for record in caplog.records)
    for words in (
        "absent cannot be read, so its figures are left out: no such file",
        "gsm8k:5 is a task",
        "short has 7 tokens",
    ):
        assert words in said


def test_a_model_is_scored_as_it_computes_and_left_as_it_was():
    seen = []

    def perplexity(model, tokens, length):
        seen.append((model.training, tokens.numel(), length))
        return SimpleNamespace(value=float(tokens.numel()))

    model = nn.Dropout(0.5).train()
    evaluate = evaluation_on(spec("a"), {"a": torch.arange(20), "b": torch.arange(9)}, SimpleNamespace(perplexity=perplexity))
    assert evaluate(model) == {"a": 20.0, "b": 9.0}
    assert seen == [(False, 20, 8), (False, 9, 8)]
    assert model.training
