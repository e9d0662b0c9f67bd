"""The corpora that papers name: where they are, how their rows are joined, and how each is scored.

The rules are those of the published evaluations, kept to the letter because a perplexity depends on each of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.errors import DataError
from jobs.texts.windows import SPECIAL_TOKENS, Texts

EVALUATION_WINDOWS = 256  # of C4
C4_NEW_DOCUMENTS = 1100


@dataclass(frozen=True, kw_only=True)
class CorpusCard:
    """One corpus. ``joiner`` puts its rows together to one text; None keeps them documents that are drawn one by one.

    ``line`` makes a row of one line of the original text file, as the hub's own script does. ``longer_than`` is how many tokens
    more than a window a document must have.
    """

    name: str
    hub: str
    subname: str | None = None
    revision: str | None = None
    data_files: Mapping[str, str] = field(default_factory=dict)
    column: str = "text"
    joiner: str | None = None
    line: Callable[[str], str] = str.strip
    evaluation_split: str = "test"
    longer_than: int = 0
    aliases: tuple[str, ...] = ()


def _wikitext_line(line: str) -> str:
    """A row of wikitext: the line with its line end; a blank one is empty."""
    return line if line.strip() else ""


_C4 = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
_C4_REVISION = "607bd4c8450a42878aa9ddc051a65a055450ef87"
_PTB = "ptb-text-only/ptb_text_only"

CARDS = (
    CorpusCard(
        name="wikitext2",
        hub="Salesforce/wikitext",
        subname="wikitext-2-raw-v1",
        joiner="\n\n",
        line=_wikitext_line,
        aliases=("wikitext-2", "wikitext-2-raw-v1"),
    ),
    CorpusCard(
        name="ptb",
        hub=_PTB,
        subname="penn_treebank",
        column="sentence",
        joiner="\n\n",
        evaluation_split="validation",
        aliases=("ptb_text_only",),
    ),
    CorpusCard(name="ptb_new", hub=_PTB, subname="penn_treebank", column="sentence", joiner=" "),
    CorpusCard(
        name="c4",
        hub="allenai/c4",
        revision=_C4_REVISION,
        data_files=_C4,
        evaluation_split="validation",
        aliases=("allenai/c4",),
    ),
    CorpusCard(name="c4_new", hub="allenai/c4", revision=_C4_REVISION, data_files=_C4, evaluation_split="validation"),
    CorpusCard(
        name="pajama",
        hub="togethercomputer/RedPajama-Data-1T-Sample",
        evaluation_split="train",  # it has no other; a model that is calibrated on it is scored on some of the same documents
        longer_than=1,
        aliases=("redpajama", "red_pajama", "togethercomputer/redpajama-data-1t-sample"),
    ),
)


def find_card(name: str, subname: str | None = None) -> CorpusCard | None:
    """The corpus of this name or alias, in any letter case; also ``wikitext`` with the subname of WikiText-2."""
    wanted = name.casefold()
    if wanted in ("wikitext", "salesforce/wikitext") and subname == "wikitext-2-raw-v1":
        wanted = "wikitext2"
    return next((card for card in CARDS if wanted == card.name or wanted in card.aliases), None)


def join_rows(texts: Texts, joiner: str, most: int | None = None) -> str:
    """The first ``most`` rows (all, by default), empty ones included, as one text."""
    count = len(texts) if most is None else min(most, len(texts))
    return joiner.join(texts.fetch(range(count)))


def c4_evaluation(texts: Texts, encode: Callable[[Sequence[str]], list[Tensor]], sequence_length: int, origin: str) -> Tensor:
    """The 256 windows that C4 is scored on, one after the other, [256 * sequence_length] int64.

    The draws are those of the reference (Python's generator seeded with 0; one draw for a document until one has at least
    ``sequence_length`` tokens, one for the window unless the document has exactly that many), so the text that is scored
    depends on the tokenizer and on the length, as it does there. Documents too short in bytes are not tokenised: the outcome
    of the draw is known.

    Raises:
        DataError: No document is long enough.
    """
    draw = random.Random(0)
    short: set[int] = set()
    windows: list[Tensor] = []
    while len(windows) < EVALUATION_WINDOWS:
        document = draw.randint(0, len(texts) - 1)
        tokens = None if document in short else _long_enough(texts, encode, document, sequence_length)
        if tokens is None:
            short.add(document)
            if len(short) == len(texts):
                raise DataError(
                    f"{origin}: none of {len(texts)} documents has {sequence_length} tokens. Lower EVALUATION.sequence_length, "
                    "or name a larger file under CORPORA."
                )
            continue
        start = 0 if tokens.numel() == sequence_length else draw.randint(0, tokens.numel() - sequence_length - 1)
        windows.append(tokens[start : start + sequence_length])
    return torch.cat(windows)


def _long_enough(
    texts: Texts, encode: Callable[[Sequence[str]], list[Tensor]], document: int, sequence_length: int
) -> Tensor | None:
    (text,) = texts.fetch([document])
    if len(text.encode(errors="replace")) + SPECIAL_TOKENS < sequence_length:
        return None
    (tokens,) = encode([text])
    return tokens if tokens.numel() >= sequence_length else None
