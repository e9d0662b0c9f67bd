"""The pieces of AWQ's search against closed forms and loops."""

import math

import pytest
import torch

from algorithms.numerics.grids.channel_scales import (
    Candidate,
    activation_scales,
    best_candidate,
    normalised,
    search_ratios,
    some_rows,
    weight_shares,
)


@pytest.mark.parametrize("ratio", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("duo", [False, True])
def test_factors_by_hand(ratio, duo):
    sizes, shares = torch.tensor([4.0, 0.25, 1.0]), torch.tensor([0.5, 1.0, 0.125])
    by_hand = [4.0**ratio, 0.25**ratio, 1.0]
    if duo:
        by_hand = [value / (share ** (1 - ratio) + 1e-4) for value, share in zip(by_hand, (0.5, 1.0, 0.125), strict=True)]
    middle = math.sqrt(max(by_hand) * min(by_hand))
    found = activation_scales(sizes, shares if duo else None, ratio)
    assert found.tolist() == pytest.approx([value / middle for value in by_hand], rel=1e-5)
    assert (found.max() * found.min()).item() == pytest.approx(1.0)


def test_a_channel_that_no_token_reaches_counts_as_middling():
    found = activation_scales(torch.tensor([16.0, 0.0, 0.25]), None, 0.5)
    assert (found / found[1]).tolist() == pytest.approx([4 / math.sqrt(2), 1.0, 0.5 / math.sqrt(2)], rel=1e-5)
    assert activation_scales(torch.zeros(3), None, 0.5).tolist() == [1.0, 1.0, 1.0]


def test_factors_are_finite_whatever_comes_in():
    found = normalised(torch.tensor([math.inf, math.nan, 0.0, 4.0]))
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    assert found[0] == found[1]
    assert (found[3] / found[0]).item() == pytest.approx(4.0)
    assert (found[0] / found[2]).item() == pytest.approx(1e4, rel=1e-4)


def test_shares_of_ranges_by_loops():
    matrix = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    matrix[2, 4:8] = 0.0
    for column in range(12):
        first = column // 4 * 4
        rows = [
            matrix[row, column].abs().item() / max(matrix[row, first : first + 4].abs().max().item(), 1e-30) for row in range(5)
        ]
        assert weight_shares(matrix, 4)[column].item() == pytest.approx(sum(rows) / 5, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("target", [0.0, 0.31, 0.5, 1.0])
def test_the_ratio_is_the_best_of_the_fine_grid(steps, target):
    tried = []

    def loss(scales):
        tried.append(scales.item())
        return (scales.item() - target) ** 2

    candidate, least = search_ratios(lambda ratio: Candidate(scales=torch.tensor(ratio), label=f"{ratio:g}"), loss, steps=steps)
    grid = [torch.tensor(place / steps).item() for place in range(steps + 1)]
    assert least == min((ratio - target) ** 2 for ratio in grid)
    assert float(candidate.label) == pytest.approx(candidate.scales.item(), abs=1e-5)
    assert len(tried) == len(set(tried)) <= steps // 2 + 3
    assert set(tried) <= set(grid)


def test_no_factors_where_none_of_them_helps():
    made = Candidate(scales=torch.tensor([2.0, 0.5]), label="inputs 0.5")
    helped = best_candidate([(made, 0.9)], 1.0, 2, made.scales)
    assert (helped.candidate, helped.loss, helped.plain_loss) == (made, 0.9, 1.0)
    for loss in (1.0, 1.1, math.nan):
        left = best_candidate([(made, loss)], 1.0, 2, made.scales)
        assert left.candidate.label == "none"
        assert left.candidate.scales.tolist() == [1.0, 1.0]
        assert left.loss == left.plain_loss == 1.0


@pytest.mark.parametrize(("rows", "kept"), [(7, 7), (512, 512), (1023, 1023), (1024, 512), (12288, 512)])
def test_so_many_rows_stand_for_all(rows, kept):
    matrix = torch.arange(rows, dtype=torch.float32)[:, None]
    found = some_rows(matrix)[:, 0]
    assert len(found) == kept
    assert found.diff().unique().numel() <= 1
