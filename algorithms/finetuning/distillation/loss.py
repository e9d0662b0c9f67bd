"""The KL divergence from the original model's next-token distributions, with its gradient taken in the same pass.

Logits of a large vocabulary are the largest tensors of a step. Automatic differentiation would keep several copies of them;
here they are passed over a few rows at a time, and the gradient takes the place of the student's logits.

Legend: n scored positions, V vocabulary, k kept logits of a cached teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# So many are passed over at a time: a megabyte, which stays in cache.
_MAX_LOGITS = 1 << 18
_MAX_LOGITS_ON_DEVICE = 1 << 24

_FLOOR = 1e-12  # of a tail's mass


@dataclass(frozen=True, kw_only=True)
class TopLogits:
    """What is kept of a teacher's distribution: log probabilities [n, k] of ``tokens`` [n, k], and all others' mass [n].

    Log probabilities may be rounded: they are taken relative to each other, the mass decides what they have together.
    """

    log_probabilities: Tensor
    tokens: Tensor
    tail: Tensor


def kl_divergence(student: Tensor, teacher: Tensor | TopLogits) -> Tensor:
    """Sum over positions of KL(teacher, student) in nats, differentiable in the student's logits.

    The student's logits are overwritten by the backward pass and must not be used after it. With :class:`TopLogits` the tokens
    that were not kept count as one: the divergence of the distributions over k + 1 outcomes, which is never larger.

    Args:
        student: logits [n, V] of any floating dtype.
        teacher: logits [n, V], or the kept ones.

    Returns:
        A float32 scalar.
    """
    if isinstance(teacher, TopLogits):
        total: Tensor = _Divergence.apply(student, teacher.log_probabilities, teacher.tokens, teacher.tail)
    else:
        total = _Divergence.apply(student, teacher, None, None)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own
        student: Tensor,
        teacher: Tensor,
        tokens: Tensor | None,
        tail: Tensor | None,
    ) -> Tensor:
        """Logits to the sum; the gradient [n, V] is kept in the student's dtype."""
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        limit = _MAX_LOGITS if student.device.type == "cpu" else _MAX_LOGITS_ON_DEVICE
        rows = max(1, limit // student.shape[1])
        for start in range(0, student.shape[0], rows):
            part = slice(start, start + rows)
            logits = student[part].float()
            if tokens is None or tail is None:
                value, slope = _whole(logits, teacher[part].float())
            else:
                value, slope = _kept(logits, teacher[part].float(), tokens[part].long(), tail[part].float())
            total += value
            if gradient is not None:
                gradient[part] = slope
        ctx.gradient = gradient
        return total.float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        """The kept gradient, scaled."""
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(outer.to(gradient.dtype)), None, None, None


def _whole(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence of full distributions, and its gradient softmax(student) - softmax(teacher)."""
    log_q = student.log_softmax(1)
    log_p = teacher.log_softmax(1)
    p = log_p.exp()
    value = torch.sum(p * (log_p - log_q), dtype=torch.float64)
    return value, log_q.exp_().sub_(p)


def _kept(student: Tensor, log_p: Tensor, tokens: Tensor, tail_p: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence over the kept tokens and the tail, whose gradient its tokens share in proportion to their probabilities."""
    log_q = student.log_softmax(1)
    kept_log_q = log_q.gather(1, tokens)
    log_p = log_p.log_softmax(1) + torch.log1p(-tail_p)[:, None]
    p = log_p.exp()
    tail_q = (1 - kept_log_q.exp().sum(1)).clamp_min(_FLOOR)
    value = torch.sum(p * (log_p - kept_log_q), dtype=torch.float64)
    value = value + torch.sum(torch.xlogy(tail_p, tail_p / tail_q), dtype=torch.float64)
    # d/dz_i: q_i (1 - tail_p / tail_q) in the tail, q_i - p_i for a kept token; each sums to the softmax's own gradient.
    q = log_q.exp_()
    kept_q = q.gather(1, tokens)
    q.mul_((1 - tail_p / tail_q)[:, None])
    return value, q.scatter_(1, tokens, kept_q - p)
