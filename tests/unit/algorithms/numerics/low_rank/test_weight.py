"""Magnitudes as PEFT's DoRA has them, and storage."""

import pytest
import torch

from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.weight import LowRankWeight, with_magnitude
from tests.support.matrices import CODERS, problem


def _weight(kind="vq", rank=5, bits=8):
    matrix, hessian = problem(37, 83)
    found = alternate(
        matrix, hessian, CODERS[kind](), torch.Generator().manual_seed(0), rank=rank, factor_bits=bits, iterations=2
    )
    return found, LowRankWeight.of(found, "vq")


def test_rows_have_the_lengths_that_they_had():
    found, weight = _weight()
    torch.testing.assert_close(weight.dequantize(), found.dequantize(), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(weight.dequantize().norm(dim=1), weight.magnitude, rtol=1e-5, atol=1e-6)
    assert weight.shape == (37, 83)


def test_a_row_of_zeros_stays_one():
    matrix = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(with_magnitude(matrix, torch.tensor([10.0, 7.0])), torch.tensor([[6.0, 8.0], [0.0, 0.0]]))


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize(("rank", "bits"), [(5, 8), (5, 16), (0, 8)])
def test_storage_is_exact_and_bits_are_those_of_the_tensors(kind, rank, bits):
    found, weight = _weight(kind, rank, bits)
    stored = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    back = LowRankWeight.restore(stored, (37, 83), kind="vq", coding=type(found.residual), factor_bits=bits)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert sum(weight.bits().values()) == sum(8 * tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert (weight.bits()["low_rank"] > 0) == (rank > 0)


def test_outputs_are_those_of_a_dora_layer_of_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed: its DoRA cannot be compared with")
    weight = _weight()[1]
    model = torch.nn.Sequential(torch.nn.Linear(83, 37, bias=True))
    model[0].weight.data = weight.residual.dequantize()
    config = peft.LoraConfig(r=5, lora_alpha=5, use_dora=True, target_modules=["0"], lora_dropout=0.0)
    layer = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(weight.low_rank.down)
        layer.lora_B["default"].weight.copy_(weight.low_rank.up)
        layer.lora_magnitude_vector["default"].weight.copy_(weight.magnitude)
    inputs = torch.randn(11, 83, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = layer.eval()(inputs)
    ours = torch.nn.functional.linear(inputs, weight.dequantize(), model[0].bias)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    plain = torch.nn.functional.linear(inputs, weight.residual.dequantize(), model[0].bias)
    assert (plain - theirs).abs().max() > 0.1
