import pytest
import torch

from algorithms.modeling.evaluation import logits as module
from algorithms.modeling.evaluation.logits import batches_of, logits_of
from algorithms.modeling.evaluation.perplexity import compare, perplexity
from algorithms.modeling.on_demand import resident, shelf_of, source_on_demand
from algorithms.modeling.source import ModelSource
from tests.support.models import save_family

WINDOWS = torch.randint(0, 60, (7, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def source(tmp_path):
    return ModelSource(save_family(tmp_path / "m", "llama", blocks=3))


def counted(model):
    """How often each block was read."""
    shelf, taken = shelf_of(model), []
    take = shelf.take
    shelf.take = lambda index: take(index) and (taken.append(index) or True)
    return taken


def test_every_block_is_read_once_for_all_batches(source):
    model = source_on_demand(source)
    taken = counted(model)
    expected = resident(source_on_demand(source))
    batches = WINDOWS.split(2)
    found = list(logits_of(model, batches))
    assert taken == [0, 1, 2]
    assert all(torch.equal(logits, expected(batch).logits) for logits, batch in zip(found, batches, strict=True))
    assert all(parameter.is_meta for parameter in shelf_of(model).blocks.parameters())


def test_what_does_not_fit_together_goes_in_groups(source, monkeypatch):
    model, expected = source_on_demand(source), resident(source_on_demand(source))
    taken = counted(model)
    # Room for 30 tokens of 32 features: 4 bytes, 3 copies, a quarter of what is free.
    monkeypatch.setattr(module, "free_bytes", lambda device: 30 * 32 * 4 * 3 * 4)
    batches = WINDOWS.split(1)
    found = torch.cat(list(logits_of(model, batches)))
    assert taken == [0, 1, 2] * 4, "two windows of twelve tokens at a time"
    assert torch.allclose(found, expected(WINDOWS).logits, atol=1e-6)
    monkeypatch.setattr(module, "free_bytes", lambda device: 0)
    assert torch.allclose(torch.cat(list(logits_of(model, batches))), expected(WINDOWS).logits, atol=1e-6)


def test_figures_are_those_of_the_model_in_memory(source, tmp_path):
    other = ModelSource(save_family(tmp_path / "other", "llama", blocks=2))
    tokens = WINDOWS.flatten()
    model, base = source_on_demand(source), source_on_demand(other)
    expected = compare(resident(source_on_demand(source)), resident(source_on_demand(other)), tokens, 12)
    assert compare(model, base, tokens, 12) == expected
    assert perplexity(model, tokens, 12) == expected.perplexity
    assert compare(model, model, tokens, 12).top1_agreement == 1, "the same blocks on demand twice"


def test_gradients_are_as_they_were_between_the_batches(source):
    for model in (source_on_demand(source), resident(source_on_demand(source))):
        for logits in logits_of(model, WINDOWS.split(3)):
            assert torch.is_grad_enabled()
            assert not logits.requires_grad
    assert torch.is_grad_enabled()


def test_leaving_early_leaves_no_hooks(source):
    model = source_on_demand(source)
    before = [len(block._forward_pre_hooks) for block in shelf_of(model).blocks]
    for _ in logits_of(model, WINDOWS.split(1)):
        break
    assert [len(block._forward_pre_hooks) for block in shelf_of(model).blocks] == before


def test_batches_hold_about_as_many_tokens_each():
    assert [batch.shape[0] for batch in batches_of(torch.zeros(9, 512, dtype=torch.int64))] == [4, 4, 1]
    assert len(batches_of(torch.zeros(2, 5000, dtype=torch.int64))) == 2
