"""The optimizer against torch's own, and LAMB against its definition."""

import math

import pytest
import torch

from algorithms.finetuning.distillation.adam import AdamRule, adam_step


def _gradients(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, generator=generator) for _ in range(count)]


def _run(rule, rate=0.01, count=6):
    tensor = torch.ones(4, 5)
    moments = rule.moments(tensor)
    for step, gradient in enumerate(_gradients(count), start=1):
        adam_step(tensor, gradient, moments, rule=rule, rate=rate, step=step)
    return tensor


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.99)])
def test_adam_is_torchs(betas, amsgrad):
    wanted = torch.ones(4, 5, requires_grad=True)
    optimizer = torch.optim.Adam([wanted], lr=0.01, betas=betas, eps=1e-6, amsgrad=amsgrad)
    for gradient in _gradients(6):
        wanted.grad = gradient
        optimizer.step()
    found = _run(AdamRule(beta1=betas[0], beta2=betas[1], amsgrad=amsgrad))
    # The two put the smallest of denominators in other places.
    assert torch.allclose(found, wanted.detach(), atol=2e-5)


def test_without_debias_the_first_step_is_the_bare_ratio():
    rule = AdamRule(beta1=0.9, beta2=0.95, debias=False)
    (gradient,) = _gradients(1)
    wanted = 1 - 0.01 * (0.1 * gradient) / ((0.05 * gradient.square()).sqrt() + 1e-6)
    assert torch.allclose(_run(rule, count=1), wanted, atol=1e-6)


def test_a_lamb_step_is_a_share_of_the_tensors_size():
    """Debiased on its first step: rate * sqrt(1 - beta2) / (1 - beta1) of the norm."""
    rule = AdamRule(beta1=0.9, beta2=0.95, lamb=True)
    moved = (_run(rule, count=1) - 1).norm()
    assert moved.item() == pytest.approx(0.01 * math.sqrt(0.05) / 0.1 * math.sqrt(20), rel=1e-4)


def test_lamb_leaves_a_tensor_of_zeros_to_adam():
    rule = AdamRule(beta1=0.0, beta2=0.5, lamb=True)
    tensor, (gradient,) = torch.zeros(4, 5), _gradients(1)
    adam_step(tensor, gradient, rule.moments(tensor), rule=rule, rate=0.1, step=1)
    assert torch.allclose(tensor, -0.1 * gradient.sign(), atol=1e-4)


def test_parts_of_a_tensor_are_stepped_like_the_whole():
    """LAMB's norms are those of all parts: ``sum_`` adds what the other ranks hold."""
    rule, (gradient,) = AdamRule(beta1=0.9, beta2=0.95, lamb=True), _gradients(1)
    whole = torch.arange(20.0).view(4, 5)
    halves, slopes = [whole[:2].clone(), whole[2:].clone()], gradient.split(2)

    def step(tensor, slope, sum_=lambda sums: None):
        adam_step(tensor, slope, rule.moments(tensor), rule=rule, rate=0.01, step=1, sum_=sum_)

    seen = []
    for half, slope in zip(halves, slopes, strict=True):
        step(half.clone(), slope, lambda sums: seen.append(sums.clone()))
    for half, slope in zip(halves, slopes, strict=True):
        step(half, slope, lambda sums: sums.copy_(seen[0] + seen[1]))
    step(whole, gradient)
    assert torch.allclose(torch.cat(halves), whole, atol=1e-6)


def test_sixteen_bit_moments_stay_close():
    rule = AdamRule(beta1=0.9, beta2=0.95, sixteen_bit=True)
    assert {kind: moment.dtype for kind, moment in rule.moments(torch.ones(2)).items()} == {
        "first": torch.float16,
        "second": torch.bfloat16,
    }
    exact = _run(AdamRule(beta1=0.9, beta2=0.95))
    assert torch.allclose(_run(rule), exact, atol=1e-3)
    assert not torch.equal(_run(rule), exact)
