from itertools import product

import pytest
import torch

from algorithms.numerics.residuals.neural.quantizers import (
    embedding_codes,
    embedding_values,
    rounded_weight,
    row_scales,
    straight_through,
    weight_codes,
    weight_values,
)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_a_value_gets_the_nearest_of_even_steps_from_minus_one_to_one(bits):
    top = (1 << bits) - 1
    values = torch.tanh(torch.randn(200, generator=torch.Generator().manual_seed(bits)) * 2)
    tops = torch.full_like(values, top)
    steps = torch.linspace(-1, 1, top + 1)
    nearest = (values[:, None] - steps).abs().amin(1)
    codes = embedding_codes(values, tops)
    assert codes.min() >= 0
    assert codes.max() <= top
    torch.testing.assert_close((values - embedding_values(codes, tops)).abs(), nearest, atol=1e-6, rtol=0)
    torch.testing.assert_close(embedding_values(codes, tops), steps[codes.long()], atol=1e-6, rtol=0)


def test_every_value_has_its_own_number_of_steps():
    values, tops = torch.tensor([0.3, 0.3, 0.3]), torch.tensor([1.0, 3.0, 255.0])
    found = embedding_values(embedding_codes(values, tops), tops)
    torch.testing.assert_close(found, torch.tensor([1.0, 1 / 3, 2 * 166 / 255 - 1]))


def test_rows_of_a_weight_get_the_nearest_multiples_of_their_scale():
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[2] *= 100
    tops = torch.tensor([1.0, 3.0, 7.0])
    scales = row_scales(weight, tops)
    codes = weight_codes(weight, scales, tops)
    for row, top in enumerate(tops.tolist()):
        largest = weight[row].abs().max().item()
        assert scales[row].item() == pytest.approx(largest / top, rel=1e-3)
        assert scales[row] == scales[row].half()
        steps = torch.arange(-top, top + 1) * scales[row]
        nearest = (weight[row].flatten()[:, None] - steps).abs().amin(1)
        found = (weight[row] - weight_values(codes, scales)[row]).abs().flatten()
        torch.testing.assert_close(found, nearest, atol=1e-5 * largest, rtol=0)
    assert torch.equal(rounded_weight(weight, tops), straight_through(weight, weight_values(codes, scales)))


def test_gradients_pass_rounding():
    weight = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    factors = torch.tensor(list(product((1.0, -2.0), (3.0, 4.0, 5.0)))).prod(1).view(2, 3, 1, 1)
    (rounded_weight(weight, torch.tensor([1.0, 3.0])) * factors).sum().backward()
    assert torch.equal(weight.grad, factors)


def test_a_row_of_zeros_stays_one():
    weight, tops = torch.zeros(1, 4, 1, 1), torch.tensor([3.0])
    assert torch.equal(rounded_weight(weight, tops), weight)
