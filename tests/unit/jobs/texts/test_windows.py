from collections import Counter
from itertools import pairwise

import pytest
import torch

from algorithms.base import TokenRequest
from configs.errors import DataError
from jobs.texts.documents import TextList
from jobs.texts.windows import Corpus, choose, joined, keyed_generator, permutation, split_validation, window_starts

EOS = 0
STRIDE = 10_000  # document d is the numbers d * STRIDE + 1, d * STRIDE + 2, ...: a window says by itself where it comes from


class Encoded:
    """Stands in for a tokenizer: a text is its document's number and length; counts what was tokenised."""

    def __init__(self):
        self.calls = Counter()

    def __call__(self, texts):
        return [self._tokens(text) for text in texts]

    def _tokens(self, text):
        document, length = (int(part) for part in text.split()[:2])
        self.calls[document] += 1
        return torch.arange(1, length + 1) + document * STRIDE


def corpus(lengths, **options):
    # Padding makes every text as long in bytes as it is in tokens, as real text is.
    texts = TextList([f"{index} {length} ".ljust(length, ".") for index, length in enumerate(lengths)])
    return Corpus(texts=texts, encode=Encoded(), separator=EOS, origin="DATA_PATH x", **options)


def request(num_samples, sequence_length, seed=0, **options):
    return TokenRequest(num_samples=num_samples, sequence_length=sequence_length, seed=seed, **options)


def is_slice_of(window, place):
    document, start = place
    return torch.equal(window[0], torch.arange(start + 1, start + 1 + window.shape[1]) + document * STRIDE)


def test_generators_depend_on_seed_purpose_and_index_and_on_nothing_else():
    torch.manual_seed(1)
    first = torch.rand(3, generator=keyed_generator(5, "a", 2))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(3, generator=keyed_generator(5, "a", 2)))
    for other in (keyed_generator(6, "a", 2), keyed_generator(5, "b", 2), keyed_generator(5, "a", 3)):
        assert not torch.equal(first, torch.rand(3, generator=other))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    choose(corpus([50] * 20), request(5, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_window_starts_are_disjoint_and_inside():
    for length in (8, 9, 15, 16, 17, 100):
        starts = sorted(window_starts(length, 8, seed=3, document=length))
        assert len(starts) == length // 8
        assert starts[0] >= 0
        assert starts[-1] + 8 <= length
        assert all(later - earlier == 8 for earlier, later in pairwise(starts))


def test_a_single_window_starts_anywhere():
    starts = {window_starts(11, 8, seed=0, document=document)[0] for document in range(100)}
    assert starts == {0, 1, 2, 3}


def test_validation_is_the_head_of_one_permutation_and_the_rest_is_in_order():
    train, validation = split_validation(20, 6, seed=4)
    assert validation == sorted(permutation(20, 4, "validation").tolist()[:6])
    assert train == sorted(set(range(20)) - set(validation))
    assert split_validation(5, 0, seed=4) == ([0, 1, 2, 3, 4], [])


def test_long_documents_give_one_window_each_and_the_window_is_a_slice():
    lengths = [40 + index for index in range(30)]
    selection = choose(corpus(lengths), request(10, 16))
    assert len({document for document, _ in selection.places}) == 10
    assert all(is_slice_of(window, place) for window, place in zip(selection.sequences, selection.places, strict=True))
    assert all(window.shape == (1, 16) and window.dtype == torch.int64 for window in selection.sequences)


def test_the_same_seed_gives_the_same_windows_and_another_seed_others():
    texts = corpus([100] * 50)
    assert choose(texts, request(10, 16)).places == choose(texts, request(10, 16)).places
    assert choose(texts, request(10, 16)).places != choose(texts, request(10, 16, seed=1)).places


def test_no_more_documents_are_tokenised_than_are_needed():
    texts = corpus([100] * 5000)
    choose(texts, request(10, 16))
    assert sum(texts.encode.calls.values()) == 64  # one batch


def test_texts_that_cannot_be_long_enough_are_not_tokenised():
    texts = corpus([5] * 200 + [100] * 4)
    choose(texts, request(4, 64), documents_only=True)
    assert set(texts.encode.calls) == {200, 201, 202, 203}


def test_a_document_is_used_again_only_when_every_other_has_been_and_no_window_twice():
    selection = choose(corpus([64, 64, 64, 48]), request(14, 16))
    uses = [document for document, _ in selection.places]
    assert [set(uses[turn : turn + 4]) for turn in (0, 4, 8)] == [{0, 1, 2, 3}] * 3
    assert len(set(selection.places)) == 14
    assert all(is_slice_of(window, place) for window, place in zip(selection.sequences, selection.places, strict=True))
    seen = [token for window in selection.sequences for token in window.flatten().tolist()]
    assert len(seen) == len(set(seen))


def test_one_long_text_gives_windows_from_all_over_it():
    selection = choose(corpus([1000]), request(30, 16))
    starts = sorted(start for _, start in selection.places)
    assert len(set(starts)) == 30
    assert starts[0] < 300
    assert starts[-1] > 700
    assert all(is_slice_of(window, place) for window, place in zip(selection.sequences, selection.places, strict=True))


def test_short_documents_are_packed_with_the_separator_between_them():
    lengths = [5, 7, 3, 9, 4, 6] * 4
    selection = choose(corpus(lengths), request(6, 12))
    order = permutation(len(lengths), 0, "document").tolist()
    stream = []
    for document in order:
        stream += [EOS] * bool(stream) + [document * STRIDE + 1 + position for position in range(lengths[document])]
    windows = [stream[start : start + 12] for start in range(0, len(stream), 12)]
    found = [window[0].tolist() for window in selection.sequences]
    assert sorted(found) == sorted(windows[:6])
    assert "end to end" in selection.method
    for window, (document, start) in zip(found, selection.places, strict=True):
        if window[0] != EOS:
            assert window[0] == document * STRIDE + 1 + start


def test_a_separator_that_the_tokenizer_already_adds_is_not_doubled():
    texts = Corpus(
        texts=TextList(["a"] * 12),
        encode=lambda batch: [torch.tensor([5, 6, EOS]) for _ in batch],
        separator=EOS,
        origin="x",
    )
    stream = torch.cat([window[0] for window in choose(texts, request(3, 12)).sequences])
    assert stream.tolist() == [5, 6, EOS] * 12


def test_packing_takes_no_more_than_a_window_from_a_long_document_while_that_is_enough():
    lengths = [600] + [10] * 200
    selection = choose(corpus(lengths), request(40, 20))
    tokens = [token for window in selection.sequences for token in window.flatten().tolist() if token != EOS]
    assert sum(token < STRIDE for token in tokens) <= 20
    assert len(tokens) == len(set(tokens))


def test_blank_documents_are_passed_over():
    texts = Corpus(
        texts=TextList(["", " \n", "abc"]), encode=lambda batch: [torch.arange(3) for _ in batch], separator=9, origin="x"
    )
    assert choose(texts, request(1, 3)).places[0][0] == 2


def test_too_little_text_says_the_numbers_and_the_keys():
    with pytest.raises(
        DataError, match=r"3 documents with 32 tokens make 3 sequences of model_seqlen=10.*nsamples=4"
    ) as caught:
        choose(corpus([10, 10, 10]), request(4, 10))
    assert "DATA_PATH" in str(caught.value)


def test_documents_only_never_joins():
    with pytest.raises(DataError, match=r"2 of 12 documents have 16 tokens or more and give 3 windows.*nsamples=4"):
        choose(corpus([9] * 10 + [20, 40]), request(4, 16), documents_only=True)
    assert len(choose(corpus([9] * 10 + [20, 40]), request(3, 16), documents_only=True).sequences) == 3


def test_redpajama_needs_one_token_more_than_a_window():
    with pytest.raises(DataError, match="0 of 5 documents have 17 tokens or more"):
        choose(corpus([16] * 5, longer_than=1), request(1, 16), documents_only=True)


def test_unpacked_documents_are_cut_and_never_joined_or_padded():
    lengths = [4, 30, 9, 1, 17]
    selection = choose(corpus(lengths), request(4, 12, packed=False))
    assert sorted(document for document, _ in selection.places) == [0, 1, 2, 4]
    assert all(start == 0 for _, start in selection.places)
    by_document = dict(zip((document for document, _ in selection.places), selection.sequences, strict=True))
    assert {document: window.shape[1] for document, window in by_document.items()} == {0: 4, 1: 12, 2: 9, 4: 12}
    assert all(is_slice_of(window, (document, 0)) for document, window in by_document.items())
    with pytest.raises(DataError, match="4 of 5 documents have two tokens or more, but nsamples=5"):
        choose(corpus(lengths), request(5, 12, packed=False))


def test_windows_of_a_joined_text_are_disjoint_slices():
    text = torch.arange(200)
    selection = joined(text, request(10, 16), "x")
    starts = sorted(start for _, start in selection.places)
    assert all(later - earlier >= 16 for earlier, later in pairwise(starts))
    for window, (_, start) in zip(selection.sequences, selection.places, strict=True):
        assert torch.equal(window, text[None, start : start + 16])
    assert selection.counts["overlapping"] is False


def test_a_joined_text_that_is_short_gives_distinct_overlapping_windows_or_an_error_with_numbers():
    selection = joined(torch.arange(40), request(10, 16), "x")
    assert len(set(selection.places)) == 10
    assert selection.counts["overlapping"] is True
    with pytest.raises(DataError, match=r"40 tokens, too few for nsamples=26 windows of model_seqlen=16"):
        joined(torch.arange(40), request(26, 16), "x")


def test_without_a_number_packed_text_gives_every_window_of_all_documents():
    lengths = [3, 20, 1, 9, 14]
    chosen = choose(corpus(lengths), request(None, 8))
    stream = sum(lengths) + len(lengths) - 1  # one separator between each two
    assert len(chosen.sequences) == stream // 8
    seen = torch.cat([window[0] for window in chosen.sequences])
    everything = {d * STRIDE + t for d, length in enumerate(lengths) for t in range(1, length + 1)}
    found = [token for token in seen.tolist() if token != EOS]
    assert len(found) == len(set(found))
    assert set(found) <= everything
    assert len(everything) - len(found) < 8, "only the remainder of the last window is missing"
    other = choose(corpus(lengths), request(None, 8, seed=1))
    assert not torch.equal(seen, torch.cat([window[0] for window in other.sequences]))


def test_without_a_number_a_joined_text_gives_every_disjoint_window():
    chosen = joined(torch.arange(50), request(None, 8), "corpus x")
    starts = sorted(start for _, start in chosen.places)
    assert len(starts) == 6
    assert all(b - a == 8 for a, b in pairwise(starts))


def test_without_a_number_every_document_of_two_tokens_is_a_sequence():
    chosen = choose(corpus([1, 30, 2, 8]), request(None, 8, packed=False))
    assert sorted((place[0], window.numel()) for place, window in zip(chosen.places, chosen.sequences, strict=True)) == [
        (1, 8),
        (2, 2),
        (3, 8),
    ]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: choose(corpus([3, 2]), request(None, 8)), "2 documents with 6 tokens make no sequence of model_seqlen=8"),
        (lambda: choose(corpus([1, 1]), request(None, 8, packed=False)), "0 of 2 documents have two tokens or more. Lower"),
        (lambda: joined(torch.arange(5), request(None, 8), "corpus x"), "5 tokens, too few for one window of model_seqlen=8"),
    ],
)
def test_nothing_at_all_is_an_error_without_a_number_too(make, said):
    with pytest.raises(DataError, match=said) as caught:
        make()
    assert "None" not in str(caught.value)
    assert "nsamples" not in str(caught.value)
