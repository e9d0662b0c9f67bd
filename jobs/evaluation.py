"""Perplexity, KL divergence and top-1 agreement of a compressed model, beside the uncompressed one on the same windows.

The sequence length is part of every figure: the same model has another perplexity at another length.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from algorithms.base import Progress
from configs.errors import DataError
from configs.recipe import EvaluationConfig
from jobs.execution.collaborators import Collaborators
from jobs.results.artifacts import canonical_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CorpusFigures:
    """Figures on one text: ``windows`` of ``sequence_length`` tokens, ``tokens`` of them predicted.

    ``perplexity`` is the compressed model's, None where only the uncompressed one was scored. ``kl_divergence`` is the mean
    over predicted tokens of KL(uncompressed, compressed) in nats, ``top1_agreement`` the share of them with the same first
    choice; both None where they were not asked for.
    """

    corpus: str
    sequence_length: int
    windows: int
    tokens: int
    base_perplexity: float
    perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts to score on: name -> [n] int64 token ids, cut to what the recipe allows."""

    settings: EvaluationConfig
    tokens: Mapping[str, Tensor]

    def key(self, model_key: str | None) -> str:
        """Names a result: the model, the settings and every token. None as model: the uncompressed one alone."""
        digests = {name: hashlib.sha256(tokens.numpy().tobytes()).hexdigest() for name, tokens in self.tokens.items()}
        return canonical_digest([model_key, self.settings.model_dump(mode="json"), digests])


def load_texts(settings: EvaluationConfig, corpus_tokens: Callable[[str], Tensor], positions: int | None = None) -> Texts:
    """Read and check the texts of EVALUATION, before any work is done.

    Args:
        settings: the recipe's block.
        corpus_tokens: name -> [n] int64 token ids.
        positions: the longest sequence that the model was made for, where it says so.

    Raises:
        DataError: a text is too short for one window.
    """
    length = settings.sequence_length
    if positions is not None and length > positions:
        logger.warning("EVALUATION.sequence_length %d is longer than the %d tokens the model was made for.", length, positions)
    tokens = {}
    for name in settings.corpora:
        found = corpus_tokens(name)
        tokens[name] = found[: settings.max_tokens]
        if tokens[name].numel() < length:
            raise DataError(
                f"EVALUATION: {name} has {found.numel()} tokens"
                + (f" of which max_tokens keeps {tokens[name].numel()}" if tokens[name].numel() < found.numel() else "")
                + f"; one window of sequence_length {length} needs {length}. Lower EVALUATION.sequence_length."
            )
    return Texts(settings=settings, tokens=tokens)


def score(
    texts: Texts, base: nn.Module, model: nn.Module | None, *, parts: Collaborators, progress: Progress
) -> tuple[CorpusFigures, ...]:
    """Score ``model`` and ``base`` on every text, both in one pass; with ``model`` None, ``base`` alone."""
    figures = []
    with progress("evaluation", len(texts.tokens)) as step:
        for name, tokens in texts.tokens.items():
            found = _score_one(name, tokens, texts.settings, base, model, parts)
            figures.append(found)
            step(describe(found))
    return tuple(figures)


def describe(figures: CorpusFigures) -> str:
    """One line: what, on how much text, at which sequence length."""
    text = f"{figures.corpus} perplexity {figures.base_perplexity:.4g}"
    if figures.perplexity is not None:
        text += f" -> {figures.perplexity:.4g}"
    if figures.kl_divergence is not None:
        text += f", KL {figures.kl_divergence:.4g} nats, same first choice {figures.top1_agreement:.1%}"
    return f"{text} (sequence length {figures.sequence_length}, {figures.windows} windows, {figures.tokens} tokens)"


def as_records(figures: tuple[CorpusFigures, ...]) -> list[dict[str, object]]:
    """The figures as the manifest and metrics.jsonl keep them."""
    return [asdict(found) for found in figures]


def from_records(records: list[Mapping[str, Any]]) -> tuple[CorpusFigures, ...]:
    """The figures that :func:`as_records` wrote."""
    return tuple(CorpusFigures(**record) for record in records)


def _score_one(
    name: str, tokens: Tensor, settings: EvaluationConfig, base: nn.Module, model: nn.Module | None, parts: Collaborators
) -> CorpusFigures:
    length = settings.sequence_length
    if model is not None and settings.kl_divergence:
        both = parts.compare(model, base, tokens, length)
        return CorpusFigures(
            corpus=name,
            sequence_length=length,
            windows=both.perplexity.windows,
            tokens=both.perplexity.scored_tokens,
            base_perplexity=both.base_perplexity.value,
            perplexity=both.perplexity.value,
            kl_divergence=both.kl_divergence,
            top1_agreement=both.top1_agreement,
        )
    before = parts.perplexity(base, tokens, length)
    after = None if model is None else parts.perplexity(model, tokens, length).value
    return CorpusFigures(
        corpus=name,
        sequence_length=length,
        windows=before.windows,
        tokens=before.scored_tokens,
        base_perplexity=before.value,
        perplexity=after,
    )
