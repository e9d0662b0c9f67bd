"""The tokens that stages calibrate on and evaluations score, from the text that the recipe names."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress

import torch
from torch import Tensor

from algorithms.base import TokenRequest
from algorithms.modeling.source import ModelSource
from configs.errors import DataError
from configs.recipe import EvaluationConfig, Recipe
from jobs.reporting.secrets import without_secrets
from jobs.texts.corpora import C4_NEW_DOCUMENTS, EVALUATION_WINDOWS, c4_evaluation, join_rows
from jobs.texts.documents import Texts, open_documents
from jobs.texts.encoding import Encoder, tokenizer_digest
from jobs.texts.location import TextLocation, locate, locate_corpus, location_digest
from jobs.texts.token_cache import TokenSets, read_tokens, write_tokens
from jobs.texts.token_lists import check_tokenizer, check_vocabulary, first_sequences, read_token_list
from jobs.texts.windows import Corpus, Selection, choose, joined, split_validation
from jobs.workspace import Workspace, open_workspace

__all__ = ["UNSCORED", "TokenSets", "chunked_wikitext", "corpus_tokens", "load_tokens", "tokens_key"]

logger = logging.getLogger(__name__)

VERSION = 1  # of the rules that make sequences of a text; part of every key
UNSCORED = "unscored"  # asks for a part of a text that no reported figure is measured on
BLANK_LINE = "\n\n"  # between the rows of a text that is known to CORPORA alone


def tokens_key(recipe: Recipe, request: TokenRequest, source: ModelSource) -> str:
    """A hash of everything that shapes the tokens; reads the text's files but tokenises nothing.

    Raises:
        DataError: The recipe's text is not there.
    """
    return _key(locate(recipe, open_workspace(recipe)), recipe, request, source)


def load_tokens(recipe: Recipe, request: TokenRequest, source: ModelSource, workspace: Workspace) -> TokenSets:
    """The sequences that a request asks for, from the cache if it has them.

    A list of token tensors is taken in file order, each at its own length; everything else is cut to ``sequence_length``.

    Raises:
        DataError: The text is missing, cannot be read, or is too short; or its token ids do not fit the vocabulary.
    """
    location = locate(recipe, workspace)
    key = _key(location, recipe, request, source)
    cached = read_tokens(workspace.tokens_dir, key)
    if cached is not None:
        check_tokenizer([*cached.train, *cached.validation], source.vocab_size, source.directory)
        return cached
    selection, tokenizer = _select(location, recipe, request, source, workspace)
    check_tokenizer(selection.sequences, source.vocab_size, source.directory)
    count = len(selection.sequences)
    if count <= request.validation_samples:
        raise DataError(
            f"{location.origin}: {count} sequences, and val_size={request.validation_samples} of them held out leave none to "
            "work on. Lower val_size, or name more text (DATA_PATH, DATASET_NAME, SPLIT)."
        )
    train, validation = split_validation(count, request.validation_samples, request.seed)
    sets = TokenSets(
        train=tuple(selection.sequences[index] for index in train),
        validation=tuple(selection.sequences[index] for index in validation),
        key=key,
        record={
            "version": VERSION,
            "text": {
                **without_secrets(location.describe(), os.environ),
                "digest": location_digest(location),
                "split": recipe.split,
            },
            "tokenizer": tokenizer,
            "seed": request.seed,
            "validation": validation,
            **_chosen(selection),
        },
    )
    write_tokens(workspace.tokens_dir, sets)
    return sets


def corpus_tokens(name: str, recipe: Recipe, source: ModelSource, workspace: Workspace, *, split: str = "test") -> Tensor:
    """The text that a corpus is scored on, as one run of tokens ``[n]`` int64.

    Local files under CORPORA come first, the hub second. ``"test"`` stands for the part that the corpus is always scored on,
    which for ptb and c4 is their validation split; ``UNSCORED`` for another part (validation, else train) where the text has
    one. A text that is known only to CORPORA: its rows joined by blank lines, a ``.txt`` file as it stands.

    Raises:
        DataError: No such corpus or split.
    """
    location = locate_corpus(recipe, name)
    if split != UNSCORED:
        _warn_of_shared_files(name, location, recipe, workspace)
    if location.kind == "tokens":
        sequences = read_token_list(tuple(path for paths in location.files.values() for path in paths), location.origin)
        check_vocabulary(sequences, source.vocab_size, source.name, location.origin)
        return torch.cat([tokens.flatten() for tokens in sequences])
    texts = open_documents(location, recipe, workspace.cache_dir, split=_split(location, split))
    tokens = _scored_tokens(texts, Encoder(source), location, (recipe.evaluation or EvaluationConfig()).sequence_length)
    check_tokenizer([tokens], source.vocab_size, source.directory)
    return tokens


def _scored_tokens(texts: Texts, encode: Encoder, location: TextLocation, length: int) -> Tensor:
    card = location.card
    if card is not None and card.joiner is None and card.name != "c4_new":
        return c4_evaluation(texts, encode, length, location.origin)
    if card is not None and card.name == "c4_new":
        return encode([join_rows(texts, " ", C4_NEW_DOCUMENTS)])[0][: EVALUATION_WINDOWS * length]
    return encode([join_rows(texts, card.joiner if card and card.joiner else BLANK_LINE)])[0]


def chunked_wikitext(recipe: Recipe, source: ModelSource, workspace: Workspace) -> Tensor:
    """The test part of wikitext2 as ``gptq_wikitext`` joins it (spec 10.4), tokens [n] int64.

    Its rows follow one another with nothing between them, an empty row as a space and a line end.

    Raises:
        DataError: The text is not there.
    """
    location = locate_corpus(recipe, "wikitext2")
    texts = open_documents(location, recipe, workspace.cache_dir, split=_split(location, "test"))
    rows = texts.fetch(range(len(texts)))
    return Encoder(source)(["".join(row or " \n" for row in rows)])[0]


def _key(location: TextLocation, recipe: Recipe, request: TokenRequest, source: ModelSource) -> str:
    shaping: dict[str, object] = {
        "version": VERSION,
        "text": location_digest(location),
        "request": [request.num_samples, request.sequence_length, request.seed, request.validation_samples, request.packed],
    }
    if location.kind == "tokens":  # neither columns nor a tokenizer have a say
        shaping["vocabulary"] = source.vocab_size
    else:
        shaping["rows"] = [recipe.split, list(recipe.text_column), recipe.format_string]
        shaping["tokenizer"] = tokenizer_digest(source)
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def _select(
    location: TextLocation, recipe: Recipe, request: TokenRequest, source: ModelSource, workspace: Workspace
) -> tuple[Selection, object]:
    """The sequences, and what to record of the tokenizer that made them (None for a token list)."""
    if location.kind == "tokens":
        sequences = read_token_list(tuple(path for paths in location.files.values() for path in paths), location.origin)
        selection = first_sequences(sequences, request, location.origin)
        check_vocabulary(list(selection.sequences), source.vocab_size, source.name, location.origin)
        return selection, None
    encode, card = Encoder(source), location.card
    texts = open_documents(location, recipe, workspace.cache_dir, split=recipe.split, by_line=not request.packed)
    if card is not None and card.joiner is not None and request.packed:
        return joined(encode([join_rows(texts, card.joiner)])[0], request, location.origin), encode.record
    corpus = Corpus(
        texts=texts,
        encode=encode,
        separator=encode.separator,
        origin=location.origin,
        longer_than=card.longer_than if card else 0,
    )
    return choose(corpus, request, documents_only=card is not None), encode.record


def _chosen(selection: Selection) -> dict[str, object]:
    lengths = [tokens.shape[1] for tokens in selection.sequences]
    return {
        "method": selection.method,
        "counts": {**selection.counts, "tokens_chosen": sum(lengths), "shortest": min(lengths), "longest": max(lengths)},
        "samples": [list(place) for place in selection.places],
    }


def _split(location: TextLocation, split: str) -> str:
    """The split that ``"test"`` or ``UNSCORED`` means for this text; another name is taken as it stands."""
    card = location.card
    if split not in ("test", UNSCORED):
        return split
    usual = "test" if card is None else card.evaluation_split
    local = [part for part in (usual, "test", "validation") if part in location.files]
    scored = local[0] if local else usual
    if split == "test":
        return scored
    there = [part for part in ("validation", "train", "test") if not location.files or part in location.files]
    return next((part for part in there if part != scored), scored)


def _warn_of_shared_files(name: str, scored: TextLocation, recipe: Recipe, workspace: Workspace) -> None:
    with suppress(DataError):  # a job that only evaluates names no calibration text
        calibrated = {path for paths in locate(recipe, workspace).files.values() for path in paths}
        if any(path in calibrated for paths in scored.files.values() for path in paths):
            logger.warning("%s is scored on a file that the model is also calibrated on; give CORPORA.%s its own.", name, name)
