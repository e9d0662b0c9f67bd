import pytest
import torch

from algorithms.numerics.low_rank.factors import Geometry, LowRank, truncated_svd
from tests.support.matrices import problem


def _root(hessian, damping=0.01):
    """The symmetric square root of the damped Hessian and its inverse, in float64."""
    damped = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(damped)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_best_factors_are_those_of_the_weighted_decomposition(rank):
    matrix, hessian = problem(30, 20)
    root, inverse = _root(hessian)
    left, values, right = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank] @ inverse
    up, down = Geometry(hessian).best(matrix, rank, torch.Generator().manual_seed(0))
    assert (up.shape, down.shape) == ((30, rank), (rank, 20))
    torch.testing.assert_close((up @ down).double(), best, atol=1e-4, rtol=1e-4)
    error = Geometry(hessian).error(matrix - up @ down)
    assert error == pytest.approx(values[rank:].square().sum().item(), abs=1e-6, rel=1e-4)


def test_full_rank_is_exact():
    for hessian in (None, problem(30, 20)[1]):
        matrix = problem(30, 20)[0]
        up, down = Geometry(hessian).best(matrix, 20, torch.Generator().manual_seed(0))
        torch.testing.assert_close(up @ down, matrix, atol=1e-5, rtol=1e-5)


def test_a_hessian_stays_as_it_is():
    hessian = problem(10, 20)[1].double()
    before = hessian.clone()
    Geometry(hessian)
    assert torch.equal(hessian, before)


def test_errors_are_those_of_the_outputs():
    matrix, hessian = problem(10, 20)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(20, dtype=torch.float64)
    expected = torch.trace(matrix.double() @ damped @ matrix.double().T).item()
    assert Geometry(hessian).error(matrix) == pytest.approx(expected, rel=1e-9)
    assert Geometry(None).error(matrix) == pytest.approx(matrix.double().square().sum().item(), rel=1e-9)
    assert Geometry(torch.zeros(20, 20)).error(matrix) >= 0
    assert torch.isfinite(Geometry(torch.zeros(20, 20)).best(matrix, 3, torch.Generator().manual_seed(0))[1]).all()


def test_a_sketch_finds_the_largest_directions_of_a_large_matrix():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 200, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -4, 200, dtype=torch.float64)
    matrix = (left * values) @ right
    u, s, v = truncated_svd(matrix, 12, generator)
    torch.testing.assert_close(s, values[:12], atol=0, rtol=1e-3)
    error = (matrix - (u * s) @ v).square().sum().sqrt()
    assert error < 1.001 * values[12:].square().sum().sqrt()
    torch.testing.assert_close(u.T @ u, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_factors_come_back_to_the_last_bit_and_are_as_near_as_their_bits(bits):
    up, down = problem(37, 5)[0] * torch.logspace(0, -2, 5), problem(5, 83, seed=1)[0]
    found = LowRank.stored(up, down, bits)
    stored = {name: tensor.clone() for name, tensor in found.tensors().items()}
    back = LowRank.restore(stored, (37, 83), bits)
    assert torch.equal(back.up, found.up)
    assert torch.equal(back.down, found.down)
    size = sum(8 * tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert found.bits_by_component() == {"low_rank": size}
    assert LowRank.stored_size((37, 83), 5, bits) == size
    # Half a step of each factor, a step being the largest entry over the largest code.
    step = 2**-11 if bits == 16 else 0.5 / ((1 << (bits - 1)) - 1)
    for part in range(5):
        product = torch.outer(up[:, part], down[part])
        error = (torch.outer(found.up[:, part], found.down[part]) - product).abs().max()
        assert error <= 2.2 * step * up[:, part].abs().max() * down[part].abs().max()


def test_no_low_rank_part_takes_no_bits():
    for bits in (8, 16):
        none = LowRank.stored(torch.zeros(6, 0), torch.zeros(0, 9), bits)
        assert none.tensors() == {}
        assert LowRank.restore({}, (6, 9), bits).dequantize().shape == (6, 9)
        assert LowRank.stored_size((6, 9), 0, bits) == 0
