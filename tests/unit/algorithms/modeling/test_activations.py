import pytest
import torch
from transformers import AutoModelForCausalLM

from algorithms.modeling.activations import batches_of_equal_length, embed
from algorithms.modeling.source import ModelSource
from tests.support.models import FAMILIES, save_family, token_sequences


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_walking_the_blocks_gives_the_hidden_states_of_the_whole_model(tmp_path, family, attention):
    folder = save_family(tmp_path / "m", family, blocks=3)
    source = ModelSource(folder, attn_implementation=attention)
    sequences = [*token_sequences(3, 12), *token_sequences(2, 7, seed=1)]
    (activations,) = embed(source, [sequences], batch_size=2, device=torch.device("cpu"), offload=True)
    for index in range(3):
        activations.advance(source.load_block(index), index)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    norm = source.load_outside().model.norm
    assert [batch.shape[:2] for batch in activations.batches] == [(2, 12), (1, 12), (2, 7)]
    rows = [row for batch in activations.batches for row in batch]
    for sequence, row in zip(sequences, rows, strict=True):
        torch.testing.assert_close(norm(row), model.model(sequence).last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_a_sliding_window_reaches_the_blocks(tmp_path):
    folder = save_family(tmp_path / "m", "mistral", sliding_window=4)
    source = ModelSource(folder)
    sequences = token_sequences(1, 24)
    (activations,) = embed(source, [sequences], batch_size=1, device=torch.device("cpu"), offload=True)
    for index in range(2):
        activations.advance(source.load_block(index), index)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = source.load_outside().model.norm(activations.batches[0])
    torch.testing.assert_close(ours, model.model(sequences[0]).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_batches_keep_order_and_split_at_a_new_length():
    sequences = [*token_sequences(3, 5), *token_sequences(1, 4), *token_sequences(1, 5)]
    batches = batches_of_equal_length(sequences, 2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 5), (1, 5), (1, 4), (1, 5)]
    assert torch.equal(torch.cat([batches[0], batches[1]]), torch.cat(sequences[:3]))


def test_through_leaves_and_advance_replaces(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama"))
    (activations,) = embed(source, [token_sequences(2, 6)], batch_size=2, device=torch.device("cpu"), offload=True)
    before = activations.batches[0].clone()
    block = source.load_block(0)
    outputs = activations.through(block, 0)
    assert torch.equal(activations.batches[0], before)
    twin = activations.copy()
    activations.advance(block, 0)
    assert torch.equal(activations.batches[0], outputs.batches[0])
    assert torch.equal(twin.batches[0], before)


def test_hidden_states_kept_in_half_precision_stay_close(tmp_path):
    source = ModelSource(save_family(tmp_path / "m", "llama", blocks=3))
    walks = []
    for dtype in (torch.float32, torch.float16):
        (activations,) = embed(
            source, [token_sequences(2, 12)], batch_size=2, device=torch.device("cpu"), offload=True, dtype=dtype
        )
        for index in range(3):
            activations.advance(source.load_block(index), index)
        assert activations.batches[0].dtype == dtype
        walks.append(activations.batches[0].float())
    torch.testing.assert_close(walks[1], walks[0], atol=5e-3, rtol=5e-3)
