import pickle

import pytest
import torch

from algorithms.base import TokenRequest
from configs.errors import DataError
from jobs.texts.token_lists import check_vocabulary, first_sequences, read_token_list


def saved(tmp_path, value):
    path = tmp_path / "tokens.pt"
    torch.save(value, path)
    return (path,)


@pytest.mark.parametrize(
    "value",
    [
        [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])],
        [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6], dtype=torch.int32)],
        torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int16),
    ],
)
def test_the_three_forms_give_the_same_sequences(tmp_path, value):
    found = read_token_list(saved(tmp_path, value), "x")
    assert [tokens.tolist() for tokens in found] == [[[1, 2, 3]], [[4, 5, 6]]]
    assert all(tokens.dtype == torch.int64 for tokens in found)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": torch.ones(2)}, "holds a dict"),
        ([], "holds an empty list"),
        (torch.arange(4), r"holds a int64 tensor of shape \[4\]"),
        ([torch.tensor([1, 2]), torch.tensor([0.5, 1.0])], "entry 1 of the list is a float32 tensor"),
        ([torch.tensor([[1, 2], [3, 4]])], r"entry 0 has the shape \[2, 2\]"),
        ([torch.tensor([7])], r"entry 0 has the shape \[1\]"),
    ],
)
def test_anything_else_is_refused_by_what_it_is(tmp_path, value, said):
    with pytest.raises(DataError, match=said):
        read_token_list(saved(tmp_path, value), "DATA_PATH x")


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_is_not_run(tmp_path):
    path = tmp_path / "tokens.pt"
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(DataError, match="not a list of token tensors that can be read safely"):
        read_token_list((path,), "DATA_PATH x")


def test_the_first_sequences_keep_their_order_and_their_length():
    sequences = [torch.arange(2 + index)[None] for index in range(5)]
    selection = first_sequences(sequences, TokenRequest(num_samples=3, sequence_length=2, seed=0), "x")
    assert [tokens.shape[1] for tokens in selection.sequences] == [2, 3, 4]
    assert selection.places == ((0, 0), (1, 0), (2, 0))
    everything = first_sequences(sequences, TokenRequest(num_samples=None, sequence_length=2, seed=0), "x")
    assert [tokens.shape[1] for tokens in everything.sequences] == [2, 3, 4, 5, 6]
    with pytest.raises(DataError, match="has 5 sequences, but nsamples=6"):
        first_sequences(sequences, TokenRequest(num_samples=6, sequence_length=2, seed=0), "x")


def test_ids_outside_the_vocabulary_are_named():
    check_vocabulary([torch.tensor([[0, 9]])], 10, "m", "x")
    with pytest.raises(DataError, match=r"largest token id is 12, but the vocabulary of m has 10 entries \(ids 0 to 9\)"):
        check_vocabulary([torch.tensor([[0, 9]]), torch.tensor([[12, 3]])], 10, "m", "x")
    with pytest.raises(DataError, match="a token id -1"):
        check_vocabulary([torch.tensor([[0, -1]])], 10, "m", "x")
