"""Which pieces of text become calibration sequences: seeded, recorded, never the same piece twice.

Every choice has its own generator, derived from (seed, purpose, index), so that no choice depends on what was drawn before
it. Legend: N = number of sequences that are asked for (None: all there are), L = tokens of one sequence, ``tokens`` [n] int64
of one document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from algorithms.base import TokenRequest
from configs.errors import DataError

BATCH_DOCUMENTS = 64
EFFORT = 32  # tokens looked at while searching long documents, as a multiple of N * L; beyond it documents are packed
_REMEDY = "Lower nsamples or model_seqlen, or name more text (DATA_PATH, DATASET_NAME, SPLIT)."
_REMEDY_WITHOUT_COUNT = "Lower model_seqlen, or name more text (DATA_PATH, DATASET_NAME, SPLIT)."
SPECIAL_TOKENS = 4  # more than any tokenizer adds to one document


class Texts(Protocol):
    """Documents that are read only when they are asked for."""

    def __len__(self) -> int: ...

    def fetch(self, ids: Sequence[int]) -> list[str]:
        """The documents of these ids, in this order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents with what it takes to cut them: ``encode`` gives one [n] int64 tensor a text, ``separator`` is the EOS id.

    ``origin`` names the data set in errors. ``longer_than`` is how many tokens more than L a document must have to be drawn
    from (1 for RedPajama, by the published recipe; else 0).
    """

    texts: Texts
    encode: Callable[[Sequence[str]], list[Tensor]]
    separator: int | None
    origin: str
    longer_than: int = 0


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Chosen sequences, ``[1, length]`` each; ``places`` says for each where it starts: (document, token)."""

    sequences: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    method: str
    counts: Mapping[str, int | bool] = field(default_factory=dict)


def keyed_generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def permutation(count: int, seed: int, purpose: str, index: int = 0) -> Tensor:
    """The numbers below ``count``, [count] int64, in an order that (seed, purpose, index) fixes."""
    return torch.randperm(count, generator=keyed_generator(seed, purpose, index))


def split_validation(count: int, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """Ids of the training and of the validation sequences, ascending: a permutation's first ``validation`` are held out."""
    order = permutation(count, seed, "validation").tolist()
    return sorted(order[validation:]), sorted(order[:validation])


def window_starts(length: int, window: int, seed: int, document: int) -> list[int]:
    """Starts of the ``length // window`` disjoint windows of a document, in seeded order, the grid itself shifted at random."""
    count = length // window
    if count == 0:
        return []
    generator = keyed_generator(seed, "window", document)
    shift = int(torch.randint(length - count * window + 1, (), generator=generator))
    return [shift + window * cell for cell in torch.randperm(count, generator=generator).tolist()]


def choose(corpus: Corpus, request: TokenRequest, *, documents_only: bool = False) -> Selection:
    """Sequences for a request, from documents drawn lazily in seeded order.

    Unpacked: each document is one sequence, cut at L. Packed: a random window from each of N documents that are long enough;
    where those are too few, further windows of the same documents if most documents are long, else all documents end to end
    with the separator between them, cut into windows. Without an N, packed text is all documents end to end, cut into windows.

    Args:
        corpus: The documents.
        request: What the stage asks for.
        documents_only: Never join documents (the published way to sample c4 and RedPajama).

    Raises:
        DataError: Too few or too short documents; the message holds the numbers and the keys.
    """
    order = permutation(len(corpus.texts), request.seed, "document")
    if not request.packed:
        return _one_per_document(corpus, request, order)
    if request.num_samples is None:
        return _everything(corpus, request, order)
    return _drawn_windows(corpus, request, order, request.num_samples, documents_only=documents_only)


def _drawn_windows(corpus: Corpus, request: TokenRequest, order: Tensor, wanted: int, *, documents_only: bool) -> Selection:
    search = _search_long(corpus, request, order, wanted, bounded=not documents_only)
    missing = wanted - len(search.pieces)
    mostly_long = documents_only or (search.complete and 2 * len(search.lengths) >= len(order))
    capacity = sum(length // request.sequence_length for length in search.lengths.values())
    if missing == 0 or (mostly_long and capacity >= wanted):
        pieces = search.pieces + _further_windows(corpus, request, search.lengths, missing)
        return _selection(pieces, "a random window of a long enough document", _counts(corpus, long_enough=len(search.lengths)))
    if documents_only:
        raise _too_few_long(corpus, request, len(search.lengths), capacity)
    return _packed(corpus, request, order, wanted)


def joined(tokens: Tensor, request: TokenRequest, origin: str) -> Selection:
    """N windows of one long text ``tokens`` [n]: disjoint ones, or, where there are too few, ones with distinct starts.

    Without an N, all disjoint windows.

    Raises:
        DataError: Fewer than N distinct windows exist, or none.
    """
    window, count = request.sequence_length, tokens.numel()
    wanted = max(1, count // window) if request.num_samples is None else request.num_samples
    starts = window_starts(count, window, request.seed, 0)[:wanted]
    overlapping = len(starts) < wanted
    if overlapping:
        distinct = max(0, count - window + 1)
        if distinct < wanted:
            lower = "model_seqlen" if request.num_samples is None else "nsamples or model_seqlen"
            needed = "one window" if request.num_samples is None else f"nsamples={wanted} windows"
            raise DataError(
                f"{origin}: the text has {count} tokens, too few for {needed} of model_seqlen={window}. Lower {lower}, or name "
                "a longer text (DATASET_NAME, SPLIT, CORPORA)."
            )
        starts = permutation(distinct, request.seed, "overlapping window")[:wanted].tolist()
    return Selection(
        sequences=tuple(tokens[start : start + window].clone()[None] for start in starts),
        places=tuple((0, start) for start in starts),
        method="a random window of the joined text",
        counts={"tokens": count, "overlapping": overlapping},
    )


@dataclass
class _Search:
    """What a pass over the documents found: first windows, and the token count of each document that is long enough."""

    pieces: list[tuple[int, int, Tensor]] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    complete: bool = False


def _drawn(corpus: Corpus, order: Tensor, least_tokens: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Documents with their tokens, tokenised a batch at a time.

    A token stands for one byte at least, so a document of fewer bytes than ``least_tokens`` is passed over; so is a blank one.
    """
    for first in range(0, len(order), BATCH_DOCUMENTS):
        ids = order[first : first + BATCH_DOCUMENTS].tolist()
        rows = zip(ids, corpus.texts.fetch(ids), strict=True)
        kept = [(document, text) for document, text in rows if text.strip() and _most_tokens(text) >= least_tokens]
        encoded = corpus.encode([text for _, text in kept]) if kept else []
        yield from zip((document for document, _ in kept), encoded, strict=True)


def _most_tokens(text: str) -> int:
    return len(text.encode(errors="replace")) + SPECIAL_TOKENS


def _search_long(corpus: Corpus, request: TokenRequest, order: Tensor, wanted: int, *, bounded: bool) -> _Search:
    search, seen, window = _Search(), 0, request.sequence_length
    limit = EFFORT * wanted * window
    searched = order[: BATCH_DOCUMENTS * (EFFORT + wanted)] if bounded else order
    for document, tokens in _drawn(corpus, searched, window + corpus.longer_than):
        seen += tokens.numel()
        if tokens.numel() >= window + corpus.longer_than:
            search.lengths[document] = tokens.numel()
            start = window_starts(tokens.numel(), window, request.seed, document)[0]
            search.pieces.append((document, start, tokens[start : start + window].clone()))
        if len(search.pieces) == wanted or (bounded and seen > limit):
            return search
    search.complete = len(searched) == len(order)
    return search


def _further_windows(
    corpus: Corpus, request: TokenRequest, lengths: Mapping[int, int], missing: int
) -> list[tuple[int, int, Tensor]]:
    """``missing`` second, third, ... windows, every document giving its next one before any gives another."""
    window = request.sequence_length
    starts = {document: window_starts(length, window, request.seed, document) for document, length in lengths.items()}
    rounds = max((len(own) for own in starts.values()), default=0)
    wanted = [
        (document, starts[document][turn]) for turn in range(1, rounds) for document in starts if turn < len(starts[document])
    ]
    wanted = wanted[:missing]
    needed = list(dict.fromkeys(document for document, _ in wanted))
    found = {
        (document, start): tokens[start : start + window].clone()
        for document, tokens in _drawn(corpus, torch.tensor(needed, dtype=torch.int64))
        for owner, start in wanted
        if owner == document
    }
    return [(document, start, found[document, start]) for document, start in wanted]


def _packed(corpus: Corpus, request: TokenRequest, order: Tensor, wanted: int) -> Selection:
    """Documents end to end: at most L tokens of each as long as that is enough, else all of each."""
    window, needed, total = request.sequence_length, wanted * request.sequence_length, 0
    for longest, enough in ((window, needed), (None, None)):
        parts, places = _stream(corpus, request.seed, order, longest, enough)
        total = sum(part.numel() for part in parts)
        if total >= needed:
            return _cut_stream(corpus, request, torch.cat(parts), places)
    raise DataError(
        f"{corpus.origin}: {len(order)} documents with {total} tokens make {total // window} sequences of model_seqlen={window}"
        f", but nsamples={wanted}. {_REMEDY}"
    )


def _everything(corpus: Corpus, request: TokenRequest, order: Tensor) -> Selection:
    """All documents end to end; only what is left over at the end of the last window is dropped."""
    parts, places = _stream(corpus, request.seed, order, None, None)
    total = sum(part.numel() for part in parts)
    if total < request.sequence_length:
        raise DataError(
            f"{corpus.origin}: {len(order)} documents with {total} tokens make no sequence of "
            f"model_seqlen={request.sequence_length}. {_REMEDY_WITHOUT_COUNT}"
        )
    return _cut_stream(corpus, request, torch.cat(parts), places)


def _stream(
    corpus: Corpus, seed: int, order: Tensor, longest: int | None, enough: int | None
) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
    """Documents with separators between them, and where each stands: (place in the stream, document, first token taken).

    With ``longest``, a document gives a random stretch of at most that many tokens; with ``enough``, no more documents are read
    than give that many.
    """
    parts: list[Tensor] = []
    places: list[tuple[int, int, int]] = []
    total = 0
    for document, tokens in _drawn(corpus, order):
        start = 0
        if longest is not None and tokens.numel() > longest:
            start = window_starts(tokens.numel(), longest, seed, document)[0]
            tokens = tokens[start : start + longest]
        if parts and corpus.separator is not None and int(parts[-1][-1]) != corpus.separator:
            parts.append(torch.tensor([corpus.separator]))
            total += 1
        places.append((total, document, start))
        parts.append(tokens.clone())
        total += tokens.numel()
        if enough is not None and total >= enough:
            break
    return parts, places


def _cut_stream(corpus: Corpus, request: TokenRequest, stream: Tensor, places: list[tuple[int, int, int]]) -> Selection:
    """N (or all) of the disjoint windows of a stream [n]; ``places`` are (where in the stream, document, start), ascending."""
    window = request.sequence_length
    cells = permutation(stream.numel() // window, request.seed, "packed window")[: request.num_samples].tolist()
    offsets = torch.tensor([offset for offset, _, _ in places])
    pieces = []
    for cell in cells:
        offset, document, start = places[int(torch.searchsorted(offsets, cell * window, right=True)) - 1]
        pieces.append((document, start + cell * window - offset, stream[cell * window : (cell + 1) * window].clone()))
    counts = _counts(corpus, drawn=len(places), tokens=stream.numel())
    return _selection(pieces, "documents end to end, cut into windows", counts)


def _one_per_document(corpus: Corpus, request: TokenRequest, order: Tensor) -> Selection:
    pieces = []
    for document, tokens in _drawn(corpus, order):
        if tokens.numel() >= 2:  # one token predicts nothing
            pieces.append((document, 0, tokens[: request.sequence_length].clone()))
        if len(pieces) == request.num_samples:
            break
    if not pieces or len(pieces) < (request.num_samples or 0):
        wanted, remedy = f", but nsamples={request.num_samples}", _REMEDY
        if request.num_samples is None:
            wanted, remedy = "", _REMEDY_WITHOUT_COUNT
        raise DataError(f"{corpus.origin}: {len(pieces)} of {len(order)} documents have two tokens or more{wanted}. {remedy}")
    return _selection(pieces, "one document a sequence, cut where it is longer", _counts(corpus))


def _selection(pieces: Sequence[tuple[int, int, Tensor]], method: str, counts: Mapping[str, int]) -> Selection:
    return Selection(
        sequences=tuple(tokens[None] for _, _, tokens in pieces),
        places=tuple((document, start) for document, start, _ in pieces),
        method=method,
        counts=counts,
    )


def _counts(corpus: Corpus, **more: int) -> dict[str, int]:
    return {"documents": len(corpus.texts), **more}


def _too_few_long(corpus: Corpus, request: TokenRequest, found: int, capacity: int) -> DataError:
    least = request.sequence_length + corpus.longer_than
    return DataError(
        f"{corpus.origin}: {found} of {len(corpus.texts)} documents have {least} tokens or more and give {capacity} windows of "
        f"model_seqlen={request.sequence_length}, but nsamples={request.num_samples}. Lower nsamples or model_seqlen, or "
        "name a larger file under CORPORA."
    )
