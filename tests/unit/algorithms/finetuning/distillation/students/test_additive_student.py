"""One step of PV-Tuning, taken apart."""

import pytest
import torch
from torch import nn

from algorithms.finetuning.distillation.adam import AdamRule, adam_step
from algorithms.finetuning.distillation.students.additive_student import AdditiveStudent, PvSettings
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.numerics.codebooks.constrained_recode import RecodeLimits
from algorithms.parallel.ranks import Ranks
from tests.support.matrices import random_codes

ADAM = AdamRule(beta1=0.9, beta2=0.95)
CODES = AdamRule(beta1=0.0, beta2=0.95)


def _model(num_codebooks=1, num_codewords=16, compute=torch.float32):
    weight = random_codes(8, 12, num_codebooks=num_codebooks, num_codewords=num_codewords, group_shape=(1, 4))
    linear = CodedLinear(weight, None, container=torch.int16, master=torch.float32, compute=compute, ranks=Ranks())
    model = nn.Sequential(linear, nn.LayerNorm(8))
    return model, weight


def _student(model, **changes):
    settings = {"rule": ADAM, "lr": 0.01, "code_rule": CODES, "code_lr": 0.1, **changes}
    return AdditiveStudent(model, PvSettings(**settings), Ranks())


def _backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(20, 12, generator=generator)).square().mul(torch.arange(1.0, 9.0)).mean().backward()


def _weights(linear, weight):
    return weight.replace(
        codes=linear.unsigned(linear.codes.detach()),
        codebooks=linear.codebooks.detach().view_as(weight.codebooks),
        scales=linear.scales.detach(),
    )


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_codebooks_and_scales_follow_the_chain_rule(num_codebooks):
    """The gradients of the P-step equal those of automatic differentiation through the decoding."""
    model, weight = _model(num_codebooks)
    student = _student(model, moves_codes=False)
    _backward(model)
    gradient = model[0].gradient.clone()
    books, scales = weight.codebooks.clone().requires_grad_(), weight.scales.clone().requires_grad_()
    (weight.replace(codebooks=books, scales=scales).dequantize() * gradient).sum().backward()
    expected = {}
    for name, tensor in {"codebooks": books, "scales": scales}.items():
        moved = tensor.detach().clone()
        adam_step(moved, tensor.grad, ADAM.moments(moved), rule=ADAM, rate=0.01, step=1)
        expected[name] = moved
    student.step(1, 1.0)
    assert torch.allclose(model[0].codebooks.view_as(books), expected["codebooks"], atol=1e-5)
    assert torch.allclose(model[0].scales, expected["scales"], atol=1e-5)
    assert torch.equal(model[0].unsigned(model[0].codes), weight.codes)


@pytest.mark.parametrize(
    ("what", "moved"),
    [
        ("codes", {"0.codes"}),
        ("codebooks", {"0.codebooks"}),
        ("scales", {"0.scales"}),
        ("others", {"1.weight", "1.bias"}),
    ],
)
def test_each_kind_of_tensor_can_move_alone(what, moved):
    model, _ = _model()
    model[1].requires_grad_(what == "others")
    moves = {f"moves_{name}": name == what for name in ("codes", "codebooks", "scales")}
    student = _student(model, **moves, code_lr=3.0, limits=RecodeLimits(max_change=1.0))
    before = {name: tensor.clone() for name, tensor in student.values().items()}
    _backward(model)
    student.step(1, 1.0)
    assert {name for name, tensor in student.values().items() if not torch.equal(tensor, before[name])} == moved


def test_without_limits_the_v_step_encodes_everything_anew():
    """The whole matrix goes to the codewords nearest to W - lr u (spec/15, PV)."""
    model, weight = _model()
    student = _student(model, moves_codebooks=False, moves_scales=False, code_lr=5.0, limits=RecodeLimits(max_change=1.0))
    _backward(model)
    target = weight.dequantize()
    adam_step(target, model[0].gradient, CODES.moments(target), rule=CODES, rate=5.0, step=1)
    tiles = target.view(8, 3, 1, 4) / weight.scales.view(8, 1, 1, 1)
    nearest = (tiles - weight.codebooks[0].view(1, 1, 16, 4)).square().sum(-1).argmin(-1)
    report = student.step(1, 1.0)
    assert torch.equal(model[0].unsigned(model[0].codes)[..., 0], nearest)
    assert report.counts["codes_examined"] == 24
    assert report.counts["codes_changed"] == report.counts["codes_proposed"] == int((nearest != weight.codes[..., 0]).sum()) > 0


def test_the_trust_region_bounds_the_change_of_a_matrix():
    model, weight = _model(2)
    limits = RecodeLimits(max_change=1.0, trust_ratio=0.2, beam_size=4)
    student = _student(model, moves_codebooks=False, moves_scales=False, code_lr=5.0, limits=limits)
    _backward(model)
    report = student.step(1, 1.0)
    before, after = weight.dequantize(), _weights(model[0], weight).dequantize()
    change = (after - before).view(8, 3, 4).square().sum(2)
    assert 1 <= report.counts["codes_changed"] < report.counts["codes_proposed"]
    assert change.sum().sqrt() - change.max().sqrt() <= 0.2 * before.norm()


def test_a_target_remembers_what_its_codes_could_not_follow():
    """delta_decay 0: small steps add up until codes change; 1: each is forgotten, and none ever does."""
    changed = {}
    for delta_decay in (0.0, 1.0):
        model, _ = _model()
        model[1].requires_grad_(False)
        student = _student(
            model, moves_codebooks=False, moves_scales=False, code_lr=0.02, delta_decay=delta_decay,
            limits=RecodeLimits(max_change=1.0),
        )  # fmt: skip
        total = 0
        for number in range(1, 60):
            _backward(model)
            total += student.step(number, 1.0).counts["codes_changed"]
        changed[delta_decay] = total
    assert changed[0.0] > 0
    assert changed[1.0] == 0


def test_between_the_two_a_target_returns_by_its_share():
    model, weight = _model()
    student = _student(model, code_lr=0.01, delta_decay=0.25, moves_codebooks=False, moves_scales=False)
    _backward(model)
    moved = weight.dequantize()
    adam_step(moved, model[0].gradient, CODES.moments(moved), rule=CODES, rate=0.01, step=1)
    student.step(1, 1.0)
    after = _weights(model[0], weight).dequantize()
    assert torch.allclose(student.state()["target.0"], moved.lerp(after, 0.25), atol=1e-6)


def test_the_continuous_gradient_is_clipped_together():
    model, _ = _model()
    student = _student(model, max_grad_norm=1e-3, rule=AdamRule(beta1=0.0, beta2=0.5), moves_codes=False)
    _backward(model)
    norm = student.step(1, 1.0).gradient_norm
    assert norm > 1e-3
    seconds = [tensor for name, tensor in student.state().items() if name.startswith("moment.second")]
    assert sum(2 * second.sum().item() for second in seconds) == pytest.approx(1e-6, rel=1e-3)


def test_clipping_has_nothing_to_do_where_codes_alone_move():
    model, _ = _model()
    student = _student(model.requires_grad_(False), max_grad_norm=1.0, moves_codebooks=False, moves_scales=False)
    _backward(model)
    assert student.step(1, 1.0).gradient_norm is None


@pytest.mark.parametrize("delta_decay", [0.0, 0.5, 1.0])
def test_targets_are_free_of_the_rounding_of_the_products(delta_decay):
    """A rate of nothing leaves no distance between targets and weights: no group is further away than another."""
    model, weight = _model(compute=torch.bfloat16)
    student = _student(model, code_lr=0.0, lr=0.0, delta_decay=delta_decay)
    seen = []
    for number in (1, 2):
        model(torch.randn(20, 12)).float().square().mean().backward()
        seen.append(student._moved_target("0", number, 1.0).clone())
        student.step(number, 1.0)
    assert all(torch.equal(target, weight.dequantize()) for target in seen)


def test_a_step_uses_up_the_gradients():
    model, _ = _model()
    student = _student(model)
    _backward(model)
    student.step(1, 1.0)
    assert model[0].gradient is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_is_seen():
    model, _ = _model()
    student = _student(model)
    _backward(model)
    assert student.gradients_are_finite()
    model[0].gradient[0, 0] = torch.nan
    assert not student.gradients_are_finite()
