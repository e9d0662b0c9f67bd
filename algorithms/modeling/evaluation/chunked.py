"""Perplexity with a context before every scored token: ``gptq_wikitext``, auto-gptq's way, which is llama.cpp's (spec 10.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from algorithms.modeling.evaluation.intervals import Interval, bootstrap
from algorithms.modeling.evaluation.logits import batches_of, logits_of
from algorithms.modeling.evaluation.perplexity import exp, window_losses, windows_of

CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class ChunkedPerplexity:
    """``value`` over all chunks; ``mean_of_running`` is the mean of the perplexities of the first 1, 2, ... chunks.

    The second is what nyuntam prints. It weighs early chunks more and is kept to be comparable, not because it means anything.
    """

    value: float
    mean_of_running: float
    chunks: int
    scored_tokens: int
    context: int = CONTEXT
    interval: Interval | None = None


def chunked_perplexity(model: nn.Module, tokens: Tensor, bos_token_id: int | None, context: int = CONTEXT) -> ChunkedPerplexity:
    """Score the second half of each chunk of ``context`` tokens, whose first token is replaced by BOS.

    Position j predicts token j + 1 for j from context / 2 to context - 2.

    Args:
        model: a causal LM; may read its blocks on demand.
        tokens: int64 [n], one long text.
        bos_token_id: None keeps the first token, for tokenizers that have no BOS.
        context: tokens of a chunk, at least 4.

    Raises:
        ValueError: fewer tokens than one chunk.
    """
    chunks = windows_of(tokens, context).clone()
    targets = chunks.clone()
    if bos_token_id is not None:
        chunks[:, 0] = bos_token_id
    first = context // 2
    batches = batches_of(chunks)
    goals = targets.split([batch.shape[0] for batch in batches])
    losses = [window_losses(logits, goal, first) for logits, goal in zip(logits_of(model, batches), goals, strict=True)]
    each = torch.cat(losses)
    running = each.cumsum(0) / torch.arange(1, each.numel() + 1)
    values = [exp(value) for value in running.tolist()]
    return ChunkedPerplexity(
        value=values[-1],
        mean_of_running=sum(values) / len(values),
        chunks=len(values),
        scored_tokens=len(values) * (context - 1 - first),
        context=context,
        interval=bootstrap(lambda means: means[:, 0].exp(), each),
    )
