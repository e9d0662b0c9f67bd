import pytest
import torch

from algorithms.numerics.pruning.moments import Moments
from algorithms.numerics.pruning.scores import METRICS, channel_scores, standardised

# Two channels: values 1, 3 (mean 2, variance 1, mean square 5) and -1, -1 (variance 0, mean square 1).
MOMENTS = Moments.of(torch.tensor([[1.0, -1.0], [3.0, -1.0]]))
MATRIX = torch.tensor([[3.0, 1.0], [-4.0, 2.0]])
BY_HAND = {"IFV": [1.0, 0.0], "WIFV": [25.0, 0.0], "WIFN": [3.5 * 5**0.5, 1.5]}


@pytest.mark.parametrize("metric", METRICS)
def test_scores_by_hand(metric):
    torch.testing.assert_close(channel_scores(metric, MATRIX, MOMENTS), torch.tensor(BY_HAND[metric]))


def test_a_common_scale():
    torch.testing.assert_close(standardised(torch.tensor([1.0, 3.0, 5.0])), torch.tensor([-1.0, 0.0, 1.0]))
    assert not standardised(torch.full((4,), 7.0)).any()
    assert not standardised(torch.tensor([7.0])).any()
