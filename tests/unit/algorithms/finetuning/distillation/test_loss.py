"""The divergence against automatic differentiation in float64."""

import pytest
import torch
import torch.nn.functional as F

from algorithms.finetuning.distillation import loss
from algorithms.finetuning.distillation.loss import TopLogits, kl_divergence


def _logits(rows=9, vocabulary=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(rows, vocabulary, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def _reference(student, teacher, kept=None):
    wanted = student.detach().double().requires_grad_()
    log_p, log_q = teacher.double().log_softmax(1), wanted.log_softmax(1)
    if kept is not None:
        values, tokens = log_p.topk(kept, dim=1)
        rest_p, rest_q = 1 - values.exp().sum(1), 1 - log_q.gather(1, tokens).exp().sum(1)
        log_p = torch.cat([values, rest_p.log()[:, None]], 1)
        log_q = torch.cat([log_q.gather(1, tokens), rest_q.log()[:, None]], 1)
    value = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    value.backward()
    return value.item(), wanted.grad


@pytest.mark.parametrize("limit", [1, 80, 1 << 18])
def test_value_and_gradient_are_the_divergences(limit, monkeypatch):
    monkeypatch.setattr(loss, "_MAX_LOGITS", limit)
    student, teacher = _logits()
    value = kl_divergence(student, teacher)
    (value / 3).backward()
    expected, gradient = _reference(student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(student.grad.double(), gradient / 3, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 5, 39])
def test_kept_logits_give_the_divergence_with_one_tail(kept):
    student, teacher = _logits()
    values, tokens = teacher.log_softmax(1).topk(kept, dim=1)
    tail = 1 - values.exp().sum(1)
    value = kl_divergence(student, TopLogits(log_probabilities=values + 0.5, tokens=tokens.int(), tail=tail))
    value.backward()
    expected, gradient = _reference(student, teacher, kept)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(student.grad.double(), gradient, atol=1e-5)
    assert value.item() <= _reference(student, teacher)[0] + 1e-4


def test_equal_distributions_have_none():
    student, _ = _logits()
    value = kl_divergence(student, student.detach() + 3)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert student.grad.abs().max() < 1e-6


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = _logits()
    half = student.detach().bfloat16().requires_grad_()
    value = kl_divergence(half, teacher.bfloat16())
    value.backward()
    assert half.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(_reference(half.float(), teacher.bfloat16().float())[0], rel=1e-5)


def test_no_position_at_all_costs_nothing():
    student = torch.zeros(0, 7, requires_grad=True)
    value = kl_divergence(student, torch.zeros(0, 7))
    value.backward()
    assert value.item() == 0
