"""Adapters: what they compute, what they drop, and that merging changes nothing."""

import pytest
import torch
from torch import nn

from algorithms.finetuning.distillation.adam import AdamRule
from algorithms.finetuning.distillation.students.dense_student import DenseSettings
from algorithms.finetuning.distillation.students.lora import LoraLinear, LoraSettings, LoraStudent, adapt
from algorithms.parallel.ranks import Ranks

INPUTS = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))


def _model(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    for linear in (model[0], model[2]):
        linear.weight.data[1] = 0.0
        linear.weight.data[:, 2] = 0.0
    model.requires_grad_(False)
    adapt({"0": model[0], "2": model[2]}, model, LoraSettings(**{"rank": 2, "alpha": 8.0, **changes}))
    return model


def _student(model):
    return LoraStudent(model, DenseSettings(rule=AdamRule(beta1=0.9, beta2=0.95), lr=0.05), Ranks())


def _tuned(**changes):
    model = _model(**changes)
    student = _student(model)
    for number in (1, 2, 3):
        student.passing(number, (0, 1, 2))
        model(INPUTS).square().mul(torch.arange(1.0, 4.0)).mean().backward()
        student.step(number, 1.0)
    student.passing(None, ())
    return model, student


def test_an_adapter_starts_as_nothing():
    model = _model()
    plain = nn.Sequential(model[0].base, model[1], model[2].base)
    assert torch.equal(model(INPUTS), plain(INPUTS))


def test_an_adapter_adds_its_product_and_the_rest_stays():
    model, student = _tuned()
    fresh = _model()
    for place in (0, 2):
        tuned = model[place]
        assert torch.equal(tuned.base.weight, fresh[place].base.weight)
        weight = tuned.base.weight.double() + 8 / 2 * tuned.up.double() @ tuned.down.double()
        bias = None if tuned.base.bias is None else tuned.base.bias.double()
        inputs = INPUTS if place == 0 else torch.randn(3, 4, 5)
        torch.testing.assert_close(
            tuned(inputs).double(), nn.functional.linear(inputs.double(), weight, bias), atol=1e-5, rtol=0
        )
    assert student.values().keys() == {"0.down", "0.up", "2.down", "2.up"}
    assert model[0].up.all()


@pytest.mark.parametrize("changes", [{}, {"keeps_zeros": True}, {"dropout": 0.3}])
def test_merging_leaves_plain_linears_that_compute_the_same(changes):
    model, student = _tuned(**changes)
    expected = model(INPUTS).detach()
    student.finish()
    assert [type(module) for module in model] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(INPUTS), expected, atol=1e-5, rtol=1e-5)


def test_rows_and_columns_of_zeros_stay_zero_if_asked():
    model, student = _tuned(keeps_zeros=True)
    fresh = _model()
    student.finish()
    for place in (0, 2):
        merged, before = model[place].weight, fresh[place].base.weight
        assert torch.equal(merged == 0, before == 0)
        assert not torch.equal(merged, before)


def test_dropout_belongs_to_step_and_sequence_and_not_to_the_pass():
    model = _model(dropout=0.5)
    model[0].up.data.normal_()
    student = _student(model)

    def outputs(step, numbers):
        student.passing(step, numbers)
        return model(INPUTS[list(numbers)]).detach()

    together = outputs(7, (0, 1, 2))
    torch.testing.assert_close(torch.cat([outputs(7, (0, 1)), outputs(7, (2,))]), together)
    assert torch.equal(outputs(7, (0, 1, 2)), together)
    assert not torch.allclose(outputs(8, (0, 1, 2)), together)
    assert torch.equal(outputs(None, (0, 1, 2)), outputs(None, (0, 1, 2)))


def test_dropout_keeps_its_share_and_the_mean():
    linear = nn.Linear(400, 1, bias=False)
    linear.weight.data.zero_()
    adapter = LoraLinear(linear, LoraSettings(rank=1, alpha=1.0, dropout=0.25), "name")
    adapter.down.data.fill_(1.0)
    adapter.up.data.fill_(1.0)
    adapter.step, adapter.sequences = 0, range(8)
    kept = adapter(torch.ones(8, 50, 400)).detach() * 0.75 / 400
    assert kept.mean().item() == pytest.approx(0.75, abs=0.005)
    assert kept.unique().numel() > 20
