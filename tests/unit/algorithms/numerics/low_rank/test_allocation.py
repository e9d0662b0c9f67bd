from itertools import product

import pytest
import torch

from algorithms.numerics.low_rank.allocation import Option, allocate


def _random(matrices, options, seed):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(matrices):
        bits = torch.randint(10, 2000, (options,), generator=generator).tolist()
        errors = (torch.rand(options, generator=generator) * 100).tolist()
        found.append([Option(bits=b, error=e) for b, e in zip(bits, errors, strict=True)])
    return found


def _totals(options, places):
    chosen = [found[place] for found, place in zip(options, places, strict=True)]
    return sum(option.bits for option in chosen), sum(option.error for option in chosen)


@pytest.mark.parametrize("seed", range(8))
def test_small_budgets_are_shared_out_as_an_exhaustive_search_would(seed):
    options = _random(5, 6, seed)
    budget = 2500 + 400 * seed
    best = min(error for places in product(range(6), repeat=5) for bits, error in [_totals(options, places)] if bits <= budget)
    bits, error = _totals(options, allocate(options, budget))
    assert bits <= budget
    assert error == pytest.approx(best, rel=1e-12)


def test_large_budgets_are_kept_and_used():
    # Convex curves, as measured ones are: a matrix of many bits has many options close together.
    generator = torch.Generator().manual_seed(0)
    options = []
    for _ in range(30):
        size, strength = (
            int(torch.randint(20_000, 400_000, (), generator=generator)),
            torch.rand((), generator=generator).item(),
        )
        options.append([Option(bits=int(size * (1 + step / 40)), error=strength * 4 ** (-step / 40)) for step in range(80)])
    for per_cent in (130, 200):
        budget = sum(found[0].bits for found in options) * per_cent // 100
        bits, error = _totals(options, allocate(options, budget))
        assert 0.999 * budget <= bits <= budget
        # A lower bound that needs no search: the dual at any price of a bit.
        dual = max(
            sum(min(option.error + price * option.bits for option in found) for found in options) - price * budget
            for price in torch.logspace(-9, -4, 200).tolist()
        )
        assert dual <= error <= 1.01 * dual


def test_a_budget_below_the_least_is_refused():
    options = _random(3, 4, 0)
    least = sum(min(option.bits for option in found) for found in options)
    assert _totals(options, allocate(options, least))[0] == least
    with pytest.raises(ValueError, match=f"{least} bits are the least, and the budget is {least - 1}"):
        allocate(options, least - 1)
