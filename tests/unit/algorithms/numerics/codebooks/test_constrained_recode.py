"""The V-step's parts against brute force."""

import itertools

import pytest
import torch

from algorithms.numerics.codebooks.constrained_recode import (
    RecodeLimits,
    accepted,
    propose,
    selection_keys,
    squared_distances,
)


def _case(groups=30, codebooks=1, codewords=16, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    books = torch.randn(codebooks, codewords, width, generator=generator)
    codes = torch.randint(codewords, (groups, codebooks), generator=generator)
    scales = torch.rand(groups, generator=generator) + 0.5
    target = torch.randn(groups, width, generator=generator)
    return target, codes, scales, books


def _weights(codes, scales, books):
    return scales[:, None] * sum(books[m][codes[:, m]] for m in range(books.shape[0]))


def _all_distances(target, scales, books):
    """|T - s sum c|^2 for every tuple of codes, [N, K^M], and the tuples."""
    tuples = torch.tensor(list(itertools.product(range(books.shape[1]), repeat=books.shape[0])))
    sums = sum(books[m][tuples[:, m]] for m in range(books.shape[0]))
    return (target[:, None] - scales[:, None, None] * sums).square().sum(2), tuples


def test_distances_are_those_of_the_weights():
    target, codes, scales, books = _case(codebooks=2)
    weights = _weights(codes, scales, books)
    found = squared_distances(target, weights / scales[:, None], scales)
    assert torch.allclose(found, (target - weights).square().sum(1), atol=1e-5)


def test_one_codebook_takes_the_nearest_codeword():
    target, codes, scales, books = _case()
    found, moves = propose(target, codes, scales, books, limits=RecodeLimits(), order=torch.arange(1))
    distances, tuples = _all_distances(target, scales, books)
    assert torch.equal(found, tuples[distances.argmin(1)])
    change = _weights(found, scales, books) - _weights(codes, scales, books)
    assert torch.allclose(moves, change.square().sum(1), atol=1e-5)


def test_forced_it_takes_the_nearest_of_the_others():
    target, codes, scales, books = _case()
    best = propose(target, codes, scales, books, limits=RecodeLimits(), order=torch.arange(1))[0]
    found, _ = propose(target, best, scales, books, limits=RecodeLimits(forced=True), order=torch.arange(1))
    distances, tuples = _all_distances(target, scales, books)
    assert torch.equal(found, tuples[distances.argsort(1)[:, 1]])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_beam_of_all_codewords_finds_the_best_pair(order):
    target, codes, scales, books = _case(codebooks=2)
    limits = RecodeLimits(beam_size=books.shape[1])
    found, _ = propose(target, codes, scales, books, limits=limits, order=torch.tensor(order))
    distances, tuples = _all_distances(target, scales, books)
    assert torch.equal(found, tuples[distances.argmin(1)])


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_no_search_moves_away_from_the_target(beam_size):
    target, codes, scales, books = _case(groups=200, codebooks=3)
    before = (target - _weights(codes, scales, books)).square().sum(1)
    limits = RecodeLimits(beam_size=beam_size)
    found, _ = propose(target, codes, scales, books, limits=limits, order=torch.tensor([2, 0, 1]))
    assert torch.all((target - _weights(found, scales, books)).square().sum(1) <= before + 1e-5)


def test_a_wider_beam_is_nearer_on_the_whole():
    target, codes, scales, books = _case(groups=500, codebooks=3)
    totals = []
    for beam_size in (1, 4, 16):
        limits = RecodeLimits(beam_size=beam_size)
        found, _ = propose(target, codes, scales, books, limits=limits, order=torch.arange(3))
        totals.append((target - _weights(found, scales, books)).square().sum().item())
    assert totals[0] > totals[1] > totals[2]


def test_groups_of_scale_zero_keep_their_codes():
    target, codes, scales, books = _case(codebooks=2)
    scales[::3] = 0
    found, moves = propose(target, codes, scales, books, limits=RecodeLimits(beam_size=2), order=torch.arange(2))
    assert torch.equal(found[::3], codes[::3])
    assert torch.all(moves[::3] == 0)
    assert torch.isfinite(moves).all()


@pytest.mark.parametrize(("ratio", "taken"), [(None, 4), (1.0, 4), (0.5, 3), (0.1, 1), (1e-9, 1)])
def test_the_trust_region_takes_the_longest_prefix_and_one_more(ratio, taken):
    moves = torch.tensor([4.0, 9.0, 16.0, 1.0])  # norms of prefixes: 2, 3.6, 5.4, 5.5
    assert accepted(moves, trust_ratio=ratio, power=64.0) == taken


def test_all_proposals_of_a_wide_region_are_taken():
    assert accepted(torch.ones(3), trust_ratio=1.0, power=100.0) == 3
    assert accepted(torch.ones(0), trust_ratio=1.0, power=100.0) == 0


@pytest.mark.parametrize(("share", "count"), [(1.0, 50), (0.01, 1), (0.03, 2), (1e-9, 1)])
def test_the_share_of_examined_groups_is_rounded_up(share, count):
    assert RecodeLimits(max_change=share).count(50) == count


def test_without_temperature_the_furthest_come_first():
    distances = torch.tensor([1.0, 3.0, 2.0])
    keys = selection_keys(distances, temperature=0.0, generator=torch.Generator())
    assert torch.equal(keys, distances)


def test_a_temperature_draws_by_weight():
    """The first of the order is group i with probability w_i / sum w, w = squared distance^(0.5 / temperature)."""
    distances = torch.tensor([1.0, 4.0, 16.0])
    generator = torch.Generator().manual_seed(0)
    draws = [int(selection_keys(distances, temperature=1.0, generator=generator).argmax()) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([1.0, 2.0, 4.0]) / 7, atol=0.03)


@pytest.mark.parametrize(("codebooks", "forced"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_rank_without_any_of_the_furthest_groups_finds_nothing(codebooks, forced):
    target, codes, scales, books = _case(groups=0, codebooks=codebooks)
    limits = RecodeLimits(beam_size=2, forced=forced)
    found, moves = propose(target, codes, scales, books, limits=limits, order=torch.arange(codebooks))
    assert found.shape == (0, codebooks)
    assert moves.shape == (0,)
