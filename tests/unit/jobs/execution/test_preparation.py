"""What is said before any stage starts."""

import logging
from types import SimpleNamespace

import pytest
from torch import nn

from configs.errors import DataError
from tests.support import fake_algorithm
from tests.support.fake_job import run


@pytest.mark.parametrize(("positions", "told"), [(7, True), (8, False), (None, False)])
def test_sequences_longer_than_the_model_was_made_for_are_told(tmp_path, caplog, monkeypatch, positions, told):
    created = fake_algorithm.FakeSource.create

    def _create(directory):
        source = created(directory)
        object.__setattr__(source, "config", SimpleNamespace(to_dict=lambda: {"max_position_embeddings": positions}))
        return source

    monkeypatch.setattr(fake_algorithm.FakeSource, "create", _create)
    with caplog.at_level(logging.WARNING, logger="jobs.execution.preparation"):
        run(tmp_path)
    assert ("sequences of 8 tokens, longer than the 7 that the model was made for" in caplog.text) is told


def test_positions_that_a_model_does_not_have_are_refused(tmp_path, monkeypatch):
    config = SimpleNamespace(to_dict=lambda: {"max_position_embeddings": 7})
    created = fake_algorithm.FakeSource.create

    def _create(directory):
        source = created(directory)
        object.__setattr__(source, "config", config)
        return source

    monkeypatch.setattr(fake_algorithm.FakeSource, "create", _create)
    monkeypatch.setattr(fake_algorithm.FakeSource, "skeleton", lambda self: nn.Sequential(nn.Embedding(9, 2)))
    with pytest.raises(DataError, match=r"Lower model_seqlen of stage calibration: sequences of 8 tokens, .* has 7 positions"):
        run(tmp_path)
