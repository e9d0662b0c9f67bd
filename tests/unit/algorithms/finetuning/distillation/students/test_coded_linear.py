"""A coded linear against ``nn.Linear`` with the dense weight."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from algorithms.finetuning.distillation.sharding import recompute_activations
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.parallel.ranks import Ranks
from tests.support.matrices import random_codes


def _linear(weight, bias=None, container=torch.int8, master=torch.float32, compute=torch.float32):
    return CodedLinear(weight, bias, container=container, master=master, compute=compute, ranks=Ranks())


@pytest.mark.parametrize("container", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_codes_survive_their_container(container):
    weight = random_codes(8, 12, num_codebooks=2, num_codewords=256, group_shape=(2, 4))
    linear = _linear(weight, container=container)
    assert torch.equal(linear.unsigned(linear.codes), weight.codes)
    assert torch.allclose(linear.dense(), weight.dequantize(), atol=1e-6)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients_are_those_of_a_dense_linear(kept, with_bias):
    weight = random_codes(6, 8, num_codebooks=2, num_codewords=16, group_shape=(1, 4))
    bias = torch.randn(6) if with_bias else None
    linear = _linear(weight, bias)
    if kept:
        linear.keep_dense()
    dense = weight.dequantize().requires_grad_()
    inputs, factors = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    for _ in range(2):  # gradients add up over passes
        (linear(ours) * factors).sum().backward()
        (F.linear(theirs, dense, bias) * factors).sum().backward()
    assert torch.allclose(linear(inputs), F.linear(inputs, dense, bias), atol=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)
    assert torch.allclose(linear.gradient, dense.grad, atol=1e-4)
    if with_bias:
        assert torch.allclose(linear.bias.grad, 2 * factors.sum((0, 1)), atol=1e-4)


def test_the_weights_gradient_comes_where_nothing_else_is_trained():
    linear = _linear(random_codes(6, 8, num_codebooks=1, num_codewords=16, group_shape=(1, 4)))
    linear(torch.ones(2, 8)).sum().backward()
    assert torch.allclose(linear.gradient, torch.full((6, 8), 2.0))


def test_a_block_that_computes_again_has_the_same_gradients():
    weight = random_codes(8, 8, num_codebooks=1, num_codewords=16, group_shape=(1, 4))
    inputs = torch.randn(4, 8)
    gradients = []
    for recomputes in (False, True):
        block = torch.nn.Sequential(_linear(weight), torch.nn.SiLU(), _linear(weight))
        if recomputes:
            recompute_activations(block, checkpoint)
        block(inputs).square().sum().backward()
        gradients.append(block[0].gradient)
    assert torch.equal(*gradients)


def test_products_in_bfloat16_leave_a_float32_gradient():
    weight = random_codes(6, 8, num_codebooks=1, num_codewords=16, group_shape=(1, 4))
    linear = _linear(weight, compute=torch.bfloat16)
    output = linear(torch.ones(2, 8))
    output.sum().backward()
    assert output.dtype == torch.bfloat16
    assert linear.gradient.dtype == torch.float32
