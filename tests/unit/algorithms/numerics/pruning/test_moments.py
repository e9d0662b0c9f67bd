import numpy
import pytest
import torch

from algorithms.numerics.pruning.moments import Moments, together


def _batches(seed, offset=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [offset + scale * torch.randn(rows, 7, 5, generator=generator) for rows in (3, 1, 8, 2)]


def _streamed(batches):
    total = Moments.none(5)
    for batch in batches:
        total = total.with_(Moments.of(batch))
    return total


# Sums of squares in float32 would have no correct digit of the variance left in the last two.
@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (-3.0, 0.5), (1e4, 1.0), (1e6, 0.25)])
@pytest.mark.parametrize("seed", [0, 1])
def test_they_are_those_of_all_tokens_at_once(seed, offset, scale):
    batches = _batches(seed, offset, scale)
    rows = torch.cat(batches).reshape(-1, 5).double().numpy()
    total = _streamed(batches)
    assert total.count == rows.shape[0]
    numpy.testing.assert_allclose(total.mean.numpy(), rows.mean(0), rtol=1e-12, atol=1e-12)
    numpy.testing.assert_allclose(total.variance.double().numpy(), rows.var(0), rtol=1e-6)
    numpy.testing.assert_allclose(total.mean_square.double().numpy(), (rows**2).mean(0), rtol=1e-6)


def test_parts_of_several_processes_add_up_whoever_has_none():
    batches = _batches(2, offset=5.0)
    parts = [_streamed(batches[:1]), Moments.none(5), _streamed(batches[1:])]
    whole = _streamed(batches)
    for given in (parts, parts[::-1]):
        total = together(given)
        assert total.count == whole.count
        torch.testing.assert_close(total.mean, whole.mean)
        torch.testing.assert_close(total.deviation, whole.deviation)
    assert together([Moments.none(5), Moments.none(5)]).count == 0


def test_tokens_that_are_not_finite_are_left_out():
    tokens = torch.randn(6, 5)
    spoilt = torch.cat([tokens, torch.full((1, 5), torch.nan), torch.tensor([[1.0, torch.inf, 0.0, 0.0, 0.0]])])
    dirty, clean = Moments.of(spoilt), Moments.of(tokens)
    assert dirty.count == 6
    torch.testing.assert_close(dirty.mean, clean.mean)
    torch.testing.assert_close(dirty.variance, clean.variance)
    assert Moments.of(spoilt[6:]).count == 0
