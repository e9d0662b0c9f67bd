"""The fast elimination beside one that solves a least-squares problem from scratch for every set that could go next."""

import pytest
import torch

from algorithms.numerics.pruning import elimination
from algorithms.numerics.pruning.elimination import removal_losses


def _problem(seed, outputs=5, inputs=8, tokens=40):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, inputs, generator=generator), torch.cov(rows.T, correction=0)


def _loss(matrix, damped, gone):
    """Least squared error of the outputs where some channels are gone: what is left solves a regression onto what they gave."""
    stay = [channel for channel in range(matrix.shape[1]) if channel not in gone]
    design = torch.linalg.cholesky(damped).T  # x of unit tokens: C = design^T design
    wanted = design[:, gone] @ matrix[:, gone].T
    if not stay:
        return wanted.square().sum().item()
    solution = torch.linalg.lstsq(design[:, stay], wanted, driver="gelsd").solution
    return (design[:, stay] @ solution - wanted).square().sum().item()


def _by_brute_force(matrix, covariance, width, ridge):
    variances = covariance.diagonal()
    damped = covariance + ridge * torch.diag(variances + 1e-6 * variances.mean())
    left, gone, lost, losses, reached = list(range(matrix.shape[1] // width)), [], 0.0, {}, 0.0
    while left:
        costs = {
            unit: _loss(matrix.double(), damped, [*gone, *range(unit * width, (unit + 1) * width)]) - lost for unit in left
        }
        unit = min(left, key=costs.__getitem__)
        reached = max(reached, costs[unit])
        losses[unit], lost = reached, lost + costs[unit]
        gone += range(unit * width, (unit + 1) * width)
        left.remove(unit)
    return torch.tensor([losses[unit] for unit in sorted(losses)], dtype=torch.float64), list(losses)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("ridge", [0.01, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_their_order_are_those_of_solving_again_for_every_set(seed, ridge, width):
    matrix, covariance = _problem(seed)
    found = removal_losses(matrix, covariance, width=width, ridge=ridge)
    expected, order = _by_brute_force(matrix, covariance, width, ridge)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(found[order], found[order].cummax(0).values)


def test_a_channel_that_another_repeats_costs_nothing_until_that_one_is_gone():
    matrix, covariance = _problem(3)
    mixing = torch.cat([torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)[2:3]])
    repeated = mixing @ covariance @ mixing.T
    losses = removal_losses(torch.cat([matrix, matrix[:, :1]], 1), repeated, width=1, ridge=1e-9)
    assert losses[[2, 8]].min() < 1e-6 * losses.max()
    assert losses[[2, 8]].max() > 1e-2 * losses.max()


def test_several_that_go_at_once_cost_about_what_they_cost_one_by_one(monkeypatch):
    matrix, covariance = _problem(4, outputs=16, inputs=60, tokens=600)
    one_by_one = removal_losses(matrix, covariance, width=1, ridge=0.01)
    monkeypatch.setattr(elimination, "_ROUNDS", 20)
    at_once = removal_losses(matrix, covariance, width=1, ridge=0.01)
    assert torch.corrcoef(torch.stack([one_by_one.log(), at_once.log()]))[0, 1] > 0.95


def test_rounding_that_leaves_a_covariance_indefinite_is_no_obstacle():
    matrix, covariance = _problem(5)
    spoilt = covariance - 2 * torch.linalg.eigvalsh(covariance)[-1] / 8 * torch.ones(8, 8, dtype=torch.float64)
    assert torch.linalg.eigvalsh(spoilt)[0] < 0
    losses = removal_losses(matrix, spoilt, width=1, ridge=0.01)
    assert (losses > 0).all()
    assert not removal_losses(torch.zeros_like(matrix), covariance, width=2, ridge=0.01).any()
    assert removal_losses(matrix, torch.zeros_like(covariance), width=1, ridge=0.01).max() < 1e-30


def test_a_channel_that_never_moves_costs_nothing_however_loud_the_others_are():
    matrix, covariance = _problem(7)
    covariance[3], covariance[:, 3] = 0.0, 0.0
    covariance *= torch.outer(*[torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1e3], dtype=torch.float64)] * 2)
    losses = removal_losses(matrix, covariance, width=1, ridge=0.01)
    assert losses[3] < 1e-2 * losses[[0, 1, 2, 4, 5, 6, 7]].min()


def test_the_arguments_stay_as_they_are():
    matrix, covariance = _problem(6)
    before = matrix.clone(), covariance.clone()
    removal_losses(matrix, covariance, width=2, ridge=0.1)
    assert torch.equal(matrix, before[0])
    assert torch.equal(covariance, before[1])
