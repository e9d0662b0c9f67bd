import math

import pytest
import torch

from algorithms.modeling.evaluation.intervals import bootstrap


def first(means):
    return means[:, 0]


def test_the_interval_of_a_mean_is_the_normal_one():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    low, high = bootstrap(first, values)
    error = 1.96 * values.std(correction=0).item() / math.sqrt(400)
    assert low == pytest.approx(values.mean().item() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean().item() + error, abs=0.15 * error)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    samples = torch.empty(300, 40, dtype=torch.float64).exponential_(generator=generator)
    covered = sum(low <= 1.0 <= high for low, high in (bootstrap(first, sample) for sample in samples))
    # The percentile interval of 40 skewed values covers a little less than 95 %; binomial error 1.5 %.
    assert 0.87 <= covered / 300 <= 0.97


def test_differences_stay_paired():
    noise = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 10
    low, high = bootstrap(lambda means: means[:, 0] - means[:, 1], noise + 1, noise)
    assert low == pytest.approx(1)
    assert high == pytest.approx(1)


def test_the_same_values_give_the_same_interval_and_one_gives_none():
    values = torch.arange(9.0, dtype=torch.float64)
    assert bootstrap(first, values) == bootstrap(first, values)
    assert bootstrap(first, values[:1]) is None
