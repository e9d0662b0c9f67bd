"""What holds for every coder of residuals."""

import pytest
import torch

from algorithms.numerics.residuals.aqlm import AdditiveCoder
from algorithms.numerics.residuals.table import CODINGS, coding
from tests.support.matrices import CODERS, problem

SHAPE = (37, 83)  # that no bucket, group or tile divides


def _coded(kind, hessian=True, seed=0):
    matrix, found = problem(*SHAPE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return matrix, found, CODERS[kind]().encode(matrix, found if hessian else None, generator)


def _error(difference, hessian):
    return torch.sum((difference.double() @ hessian.double()) * difference.double()).item()


@pytest.mark.parametrize("kind", CODERS)
def test_what_is_stored_comes_back_to_the_last_bit(kind):
    _, _, coded = _coded(kind)
    stored = {name: tensor.clone() for name, tensor in coded.tensors().items()}
    back = type(coded).restore(stored, SHAPE)
    assert coded.dequantize().shape == SHAPE
    assert torch.equal(back.dequantize(), coded.dequantize())
    again = back.tensors()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) and again[name].dtype == stored[name].dtype for name in stored)


@pytest.mark.parametrize("kind", CODERS)
def test_bits_are_those_of_the_stored_tensors(kind):
    _, _, coded = _coded(kind)
    stored = sum(8 * tensor.numel() * tensor.element_size() for tensor in coded.tensors().values())
    assert sum(coded.bits().values()) == stored
    assert coded.bits()["codes"] >= 2 * SHAPE[0] * SHAPE[1] * (0.75 if kind == "aqlm" else 1)
    assert (coded.bits().get("permutation", 0) > 0) == (kind == "vq permuted")


@pytest.mark.parametrize("kind", CODERS)
def test_an_error_counts_by_the_input_it_meets(kind):
    matrix, hessian, under = _coded(kind)
    plain = _coded(kind, hessian=False)[2]
    seen, unseen = (_error(matrix - coded.dequantize(), hessian) for coded in (under, plain))
    assert seen < 0.7 * unseen
    squares = [(matrix - coded.dequantize()).square().sum() for coded in (under, plain)]
    assert squares[1] < squares[0]
    assert _error(matrix, hessian) > 4 * seen


@pytest.mark.parametrize("kind", CODERS)
def test_the_matrix_is_differentiable_in_what_may_move(kind):
    _, _, coded = _coded(kind)
    values = {name: value.clone().requires_grad_(True) for name, value in coded.movable().items()}
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (coded.decode(values) * weights).sum().backward()
    generator = torch.Generator().manual_seed(2)
    for name, value in values.items():
        direction = torch.randn(value.shape, generator=generator)
        steps = [
            (coded.decode({**coded.movable(), name: value.detach() + sign * 0.01 * direction}) * weights).double().sum()
            for sign in (1, -1)
        ]
        slope = torch.sum(value.grad.double() * direction).item()
        assert (steps[0] - steps[1]).item() / 0.02 == pytest.approx(slope, rel=2e-3, abs=2e-2), name
    moved = coded.moved({name: 1.5 * value for name, value in coded.movable().items()})
    assert torch.equal(type(coded).restore(moved.tensors(), SHAPE).dequantize(), moved.dequantize())
    factor = 1.5 ** len(values)
    torch.testing.assert_close(moved.dequantize(), factor * coded.dequantize(), atol=0.04 * factor, rtol=0.04)


@pytest.mark.parametrize("kind", CODERS)
def test_dead_inputs_and_rows_of_zeros_do_no_harm(kind):
    matrix, hessian = problem(*SHAPE)
    matrix[5:8] = 0
    hessian[11], hessian[:, 11] = 0, 0
    coded = CODERS[kind]().encode(matrix, hessian, torch.Generator().manual_seed(0))
    assert torch.isfinite(coded.dequantize()).all()
    zeros = CODERS[kind]().encode(torch.zeros(SHAPE), hessian, torch.Generator().manual_seed(0))
    assert zeros.dequantize().abs().max() < 1e-4


@pytest.mark.parametrize(("bits", "books"), [(8, 1), (9, 3), (10, 2), (15, 3), (16, 2), (22, 11)])
def test_additive_codes_have_all_the_bits_that_were_asked_for(bits, books):
    matrix, hessian = problem(8, 24)
    coded = AdditiveCoder(bits, 8).encode(matrix, hessian, torch.Generator().manual_seed(0))
    # 24 codes, in whole words of 32 bits.
    assert 0 <= coded.bits()["codes"] - 24 * bits < 32
    assert coded.tensors()["codebooks"].shape[:2] == (books, 1 << (bits // books))


def test_a_coding_that_there_is_none_of_is_refused():
    assert {coding(kind) for kind in CODINGS} == set(CODINGS.values())
    with pytest.raises(ValueError, match="residual: wavelet is not in this version; there are vq, nf, aqlm"):
        coding("wavelet")
