import random

import pytest
import torch

from configs.errors import DataError
from jobs.texts.corpora import CARDS, c4_evaluation, find_card, join_rows
from jobs.texts.documents import TextList


def encode(texts):
    return [torch.tensor([ord(character) for character in text]) for text in texts]


def reference_c4(documents, sequence_length):
    """The published sampling, as its authors wrote it: draw until long enough, then a random window."""
    random.seed(0)
    windows = []
    for _ in range(256):
        while True:
            text = documents[random.randint(0, len(documents) - 1)]
            if len(text) >= sequence_length:
                break
        if len(text) == sequence_length:
            windows.append(text)
        else:
            start = random.randint(0, len(text) - sequence_length - 1)
            windows.append(text[start : start + sequence_length])
    return torch.tensor([ord(character) for character in "".join(windows)])


def test_c4_is_scored_on_the_windows_of_the_published_evaluation():
    documents = [chr(65 + index) * 2 + "".join(chr(200 + position) for position in range(index)) for index in range(40)]
    state = random.getstate()
    try:
        expected = reference_c4(documents, 12)
    finally:
        random.setstate(state)
    assert torch.equal(c4_evaluation(TextList(documents), encode, 12, "c4"), expected)


def test_c4_without_a_long_enough_document_is_an_error_with_numbers():
    with pytest.raises(DataError, match=r"none of 3 documents has 12 tokens. Lower EVALUATION.sequence_length"):
        c4_evaluation(TextList(["abc"] * 3), encode, 12, "c4")


def test_rows_are_joined_with_the_empty_ones():
    assert join_rows(TextList(["a\n", "", "b"]), "\n\n") == "a\n\n\n\n\nb"
    assert join_rows(TextList(["a", "b", "c"]), " ", 2) == "a b"


def test_the_table_holds_the_published_rules():
    rules = {card.name: (card.hub, card.joiner, card.evaluation_split, card.column) for card in CARDS}
    assert rules == {
        "wikitext2": ("Salesforce/wikitext", "\n\n", "test", "text"),
        "ptb": ("ptb-text-only/ptb_text_only", "\n\n", "validation", "sentence"),
        "ptb_new": ("ptb-text-only/ptb_text_only", " ", "test", "sentence"),
        "c4": ("allenai/c4", None, "validation", "text"),
        "c4_new": ("allenai/c4", None, "validation", "text"),
        "pajama": ("togethercomputer/RedPajama-Data-1T-Sample", None, "train", "text"),
    }


def test_other_names_are_no_corpus():
    assert find_card("wikitext") is None
    assert find_card("org/c4") is None
