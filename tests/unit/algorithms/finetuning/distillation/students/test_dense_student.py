"""One step of dense tuning, taken apart."""

import math

import pytest
import torch
from torch import nn

from algorithms.finetuning.distillation.adam import AdamRule
from algorithms.finetuning.distillation.students.dense_student import DenseSettings, DenseStudent
from algorithms.parallel.ranks import Ranks

RULE = AdamRule(beta1=0.9, beta2=0.95, eps=1e-3)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))


def _student(model, **changes):
    return DenseStudent(model, DenseSettings(**{"rule": RULE, "lr": 0.01, **changes}), Ranks())


def _backward(model, seed=0):
    inputs = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    model(inputs).square().mul(torch.arange(1.0, 4.0)).mean().backward()


def _by_hand(start, gradients, *, lr, decay):
    """AdamW's steps one number at a time; numbers of vectors do not decay."""
    moved = start.double().clone()
    for place in range(moved.numel()):
        first = second = 0.0
        for number, gradient in enumerate(gradients, 1):
            slope = gradient.flatten()[place].item()
            first, second = 0.9 * first + 0.1 * slope, 0.95 * second + 0.05 * slope**2
            value = moved.view(-1)[place].item() * (1 - lr * decay if start.dim() > 1 else 1.0)
            unbiased = math.sqrt(1 - 0.95**number) / (1 - 0.9**number)
            moved.view(-1)[place] = value - lr * unbiased * first / (math.sqrt(second) + 1e-3)
    return moved


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_two_steps_are_those_of_adam_in_float64(decay):
    model = _model()
    student = _student(model, weight_decay=decay)
    starts = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: [] for name in starts}
    for number in (1, 2):
        _backward(model, number)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad.double())
        student.step(number, 0.5)
    for name, parameter in model.named_parameters():
        expected = _by_hand(starts[name], gradients[name], lr=0.005, decay=decay)
        torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-7, rtol=1e-6)


def test_what_wants_no_gradient_stays_and_is_no_part_of_the_state():
    model = _model()
    model[1].requires_grad_(False)
    student = _student(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _backward(model)
    student.step(1, 1.0)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"0.weight", "0.bias", "2.weight"} == student.values().keys()
    assert not any("1.weight" in name for name in student.state())


def test_zeros_of_matrices_stay_zero_while_vectors_leave_it():
    model = _model()
    model[0].weight.data[2] = 0.0
    model[2].weight.data[:, 1] = 0.0
    model[0].bias.data.zero_()
    zeros = {name: parameter.detach() == 0 for name, parameter in model.named_parameters()}
    student = _student(model, keeps_zeros=True, weight_decay=0.1)
    for number in (1, 2, 3):
        _backward(model, number)
        student.step(number, 1.0)
    for name in ("0.weight", "2.weight"):
        assert torch.equal(model.get_parameter(name) == 0, zeros[name])
    assert model[0].bias.all()


def test_without_that_they_move():
    model = _model()
    model[0].weight.data[2] = 0.0
    student = _student(model)
    _backward(model)
    student.step(1, 1.0)
    assert model[0].weight[2].all()


def test_gradients_are_clipped_together():
    model = _model()
    _backward(model)
    norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in model.parameters()))
    student = _student(model, max_grad_norm=norm / 4)
    assert student.step(1, 1.0).gradient_norm == pytest.approx(norm)
    seconds = [tensor for name, tensor in student.state().items() if name.startswith("moment.second")]
    assert sum(second.sum().item() for second in seconds) == pytest.approx(0.05 * (norm / 4) ** 2, rel=1e-5)


def test_a_gradient_that_is_not_finite_is_seen():
    model = _model()
    student = _student(model)
    _backward(model)
    assert student.gradients_are_finite()
    model[1].weight.grad[0] = torch.inf
    assert not student.gradients_are_finite()
