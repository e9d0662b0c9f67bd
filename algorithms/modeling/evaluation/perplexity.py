"""Perplexity, KL divergence and top-1 agreement of causal LMs on a text that is given as tokens (spec 10.1, GPTQ protocol)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.modeling.evaluation.intervals import Interval, bootstrap
from algorithms.modeling.evaluation.logits import batches_of, logits_of

_POSITIONS = 256  # whose distributions over the vocabulary are in memory at a time, beside the logits


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """``value`` is exp of the mean negative log-likelihood over ``scored_tokens`` targets in ``windows`` windows.

    ``interval`` is the bootstrap interval over windows, None where there is one window alone.
    """

    value: float
    sequence_length: int
    windows: int
    scored_tokens: int
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside its base on the same windows: KL(base || model) in nats a token, and how often the best tokens agree.

    ``ratio_interval`` is that of the quotient of the perplexities, whose windows are paired.
    """

    perplexity: Perplexity
    base_perplexity: Perplexity
    kl_divergence: float
    top1_agreement: float
    kl_interval: Interval | None = None
    top1_interval: Interval | None = None
    ratio_interval: Interval | None = None


def perplexity(model: nn.Module, tokens: Tensor, sequence_length: int) -> Perplexity:
    """Score non-overlapping windows, each on its own; the remainder is dropped, a window's first token is not scored.

    Args:
        model: a causal LM whose output has ``logits`` [b, length, vocabulary]; may read its blocks on demand.
        tokens: int64 [n], one long text.
        sequence_length: tokens a window, at least 2.

    Raises:
        ValueError: fewer tokens than one window.
    """
    windows = windows_of(tokens, sequence_length)
    batches = batches_of(windows)
    losses = [window_losses(logits, batch) for logits, batch in zip(logits_of(model, batches), batches, strict=True)]
    return _perplexity(torch.cat(losses), windows)


def compare(model: nn.Module, base: nn.Module, tokens: Tensor, sequence_length: int) -> Comparison:
    """Perplexity of both models and how far the second's distribution is from the base's, in one pass over the windows.

    Raises:
        ValueError: fewer tokens than one window.
    """
    windows = windows_of(tokens, sequence_length)
    rows = torch.cat(list(_compared(model, base, batches_of(windows))))
    ours, theirs, kl, agreed = rows.unbind(dim=1)
    return Comparison(
        perplexity=_perplexity(ours, windows),
        base_perplexity=_perplexity(theirs, windows),
        kl_divergence=kl.mean().item(),
        top1_agreement=agreed.mean().item(),
        kl_interval=bootstrap(lambda means: means[:, 0], kl),
        top1_interval=bootstrap(lambda means: means[:, 0], agreed),
        ratio_interval=bootstrap(lambda means: (means[:, 0] - means[:, 1]).exp(), ours, theirs),
    )


def windows_of(tokens: Tensor, sequence_length: int) -> Tensor:
    """All whole windows [windows, length] of a text [n]; the remainder is dropped.

    Raises:
        ValueError: fewer tokens than one window.
    """
    count = tokens.numel() // sequence_length
    if count == 0:
        raise ValueError(
            f"the evaluation text has {tokens.numel()} tokens, less than one window of {sequence_length}: "
            "lower EVALUATION.sequence_length or give a longer text."
        )
    return tokens[: count * sequence_length].view(count, sequence_length)


def _compared(model: nn.Module, base: nn.Module, batches: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Both losses, KL and agreement of each window of a batch [b, 4], means over its tokens, float64."""
    for logits, base_logits, batch in zip(logits_of(model, batches), logits_of(base, batches), batches, strict=True):
        pairs = zip(_slices(logits), _slices(base_logits.to(logits.device)), strict=True)
        places = torch.cat([torch.stack(_distance(q, p), dim=-1) for q, p in pairs], dim=1)
        losses = (window_losses(logits, batch), window_losses(base_logits, batch))
        yield torch.cat([torch.stack(losses, dim=1), places.mean(dim=1).cpu()], dim=1)


def _distance(logits: Tensor, base_logits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base || model) and whether the first choices agree, both [b, n] float64, of logits [b, n, vocabulary]."""
    log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(base_logits, dim=-1)
    divergence = torch.sum(log_p.exp() * (log_p - log_q), dim=-1, dtype=torch.float64)
    return divergence, (log_q.argmax(-1) == log_p.argmax(-1)).double()


def window_losses(logits: Tensor, batch: Tensor, first: int = 0) -> Tensor:
    """Mean negative log-likelihood of each window [b], float64, of the tokens behind position ``first``.

    Args:
        logits: [b, length, vocabulary].
        batch: the tokens [b, length].
        first: the first position whose prediction counts.
    """
    targets = batch[:, first + 1 :].to(logits.device).unsqueeze(-1)
    pieces = zip(_slices(logits[:, first:]), targets.split(_POSITIONS, dim=1), strict=True)
    losses = [part.logsumexp(-1) - part.gather(-1, goal).squeeze(-1) for part, goal in pieces]
    return torch.cat(losses, dim=1).double().mean(dim=1).cpu()


def _slices(logits: Tensor) -> tuple[Tensor, ...]:
    """All positions but the last, a run at a time: what is computed of them is as large as they are."""
    return logits[:, :-1].split(_POSITIONS, dim=1)


def _perplexity(losses: Tensor, windows: Tensor) -> Perplexity:
    count, length = windows.shape
    return Perplexity(
        value=exp(losses.mean().item()),
        sequence_length=length,
        windows=count,
        scored_tokens=count * (length - 1),
        interval=bootstrap(lambda means: means[:, 0].exp(), losses),
    )


def exp(value: float) -> float:
    """The exponential; infinity where a float cannot hold it, NaN of NaN."""
    return math.inf if value >= 700 else math.exp(value)
