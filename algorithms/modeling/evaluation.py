"""Perplexity, KL divergence and top-1 agreement of causal LMs on a text that is given as tokens (GPTQ protocol)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """``value`` is exp of the mean negative log-likelihood over ``scored_tokens`` targets in ``windows`` windows."""

    value: float
    sequence_length: int
    windows: int
    scored_tokens: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model beside its base on the same windows: KL(base || model) in nats a token, and how often the best tokens agree."""

    perplexity: Perplexity
    base_perplexity: Perplexity
    kl_divergence: float
    top1_agreement: float


def perplexity(model: nn.Module, tokens: Tensor, sequence_length: int) -> Perplexity:
    """Score non-overlapping windows, each on its own; the remainder is dropped, a window's first token is not scored.

    Args:
        model: a causal LM whose output has ``logits`` [b, length, vocabulary].
        tokens: int64 [n], one long text.
        sequence_length: tokens a window, at least 2.

    Raises:
        ValueError: fewer tokens than one window.
    """
    total, scored, windows = 0.0, 0, 0
    for batch in _windows(tokens, sequence_length):
        total += _negative_log_likelihood(_logits(model, batch), batch)
        scored += batch[:, 1:].numel()
        windows += batch.shape[0]
    return Perplexity(value=_exp(total / scored), sequence_length=sequence_length, windows=windows, scored_tokens=scored)


def compare(model: nn.Module, base: nn.Module, tokens: Tensor, sequence_length: int) -> Comparison:
    """Perplexity of both models and how far the second's distribution is from the base's, in one pass over the windows.

    Raises:
        ValueError: fewer tokens than one window.
    """
    sums = dict.fromkeys(("model", "base", "kl", "agree"), 0.0)
    scored, windows = 0, 0
    for batch in _windows(tokens, sequence_length):
        logits, base_logits = _logits(model, batch), _logits(base, batch)
        sums["model"] += _negative_log_likelihood(logits, batch)
        sums["base"] += _negative_log_likelihood(base_logits, batch)
        log_p, log_q = F.log_softmax(base_logits, dim=-1), F.log_softmax(logits, dim=-1)
        sums["kl"] += torch.sum(log_p.exp() * (log_p - log_q), dtype=torch.float64).item()
        sums["agree"] += torch.sum(logits.argmax(-1) == base_logits.argmax(-1)).item()
        scored += batch[:, 1:].numel()
        windows += batch.shape[0]
    shared = {"sequence_length": sequence_length, "windows": windows, "scored_tokens": scored}
    return Comparison(
        perplexity=Perplexity(value=_exp(sums["model"] / scored), **shared),
        base_perplexity=Perplexity(value=_exp(sums["base"] / scored), **shared),
        kl_divergence=sums["kl"] / scored,
        top1_agreement=sums["agree"] / scored,
    )


def _windows(tokens: Tensor, sequence_length: int) -> Iterator[Tensor]:
    count = tokens.numel() // sequence_length
    if count == 0:
        raise ValueError(
            f"the evaluation text has {tokens.numel()} tokens, less than one window of {sequence_length}: "
            "lower EVALUATION.sequence_length or give a longer text."
        )
    windows = tokens[: count * sequence_length].view(count, sequence_length)
    yield from windows.split(max(1, _TOKENS_PER_BATCH // sequence_length))


@torch.no_grad()
def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=batch.to(device), use_cache=False).logits[:, :-1].float()


def _negative_log_likelihood(logits: Tensor, batch: Tensor) -> float:
    targets = batch[:, 1:].flatten().to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    return torch.sum(losses, dtype=torch.float64).item()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
