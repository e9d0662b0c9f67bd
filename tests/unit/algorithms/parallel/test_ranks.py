import time

import pytest
import torch

from algorithms.numerics.sparse_quantized import Outliers
from algorithms.parallel.ranks import ALONE, share_out
from tests.support.rank_processes import run_on_ranks


def _talk(ranks):
    summed, counts = torch.tensor([1.0 + ranks.rank, 2.0]), torch.tensor([[ranks.rank, 5]])
    ranks.sum_(summed, counts)
    return {
        "sum": summed.tolist(),
        "counts": counts.tolist(),
        "numbers": ranks.sum_numbers(0.1, ranks.rank),
        "gathered": ranks.gather({"rank": ranks.rank}),
        "main": ranks.from_main(("from", ranks.rank)),
        "mine": ranks.mine(range(5)),
    }


def test_ranks_hear_each_other():
    first, second = run_on_ranks(_talk, 2)
    assert first.pop("mine") == [0, 2, 4]
    assert second.pop("mine") == [1, 3]
    assert first == second
    assert (first["sum"], first["counts"]) == ([3.0, 4.0], [[1, 10]])
    assert first["numbers"] == [0.2, 1.0]
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert first["main"] == ("from", 0)


def test_a_process_alone_hears_itself():
    assert _talk(ALONE) == {
        "sum": [1.0, 2.0],
        "counts": [[0, 5]],
        "numbers": [0.1, 0.0],
        "gathered": [{"rank": 0}],
        "main": ("from", 0),
        "mine": [0, 1, 2, 3, 4],
    }


def _exchange(ranks):
    part = Outliers(offsets=torch.arange(3), columns=torch.ones(1, dtype=torch.bool), values=torch.full((2,), ranks.rank / 4))
    many = [torch.full((1 << 15,), 1.0 + ranks.rank), torch.full((1 << 15, 2), 2 * ranks.rank)]
    ranks.sum_(*many)
    return ranks.exchange({"parts": [part, (part.values, "word")]}), [tensor.unique().tolist() for tensor in many]


def test_values_with_tensors_in_them_are_exchanged():
    for exchanged, totals in run_on_ranks(_exchange, 2):
        assert totals == [[3.0], [2]]
        for rank, value in enumerate(exchanged):
            outliers, (values, word) = value["parts"]
            assert outliers.values.tolist() == values.tolist() == [rank / 4] * 2
            assert (outliers.columns.dtype, outliers.offsets.tolist(), word) == (torch.bool, [0, 1, 2], "word")


def _meet(ranks):
    arrived = []
    for slowest in (0, 1):
        time.sleep(0.2 if ranks.rank == slowest else 0.0)
        before = time.monotonic()
        ranks.meet()
        arrived.append((before, time.monotonic()))
    return arrived


def test_nobody_leaves_a_meeting_before_the_last_has_come():
    for visits in zip(*run_on_ranks(_meet, 3), strict=True):
        assert max(came for came, _ in visits) <= min(left for _, left in visits)


def _fail(ranks):
    if ranks.rank == 1:
        raise RuntimeError("no more")
    ranks.meet()


def test_a_rank_that_fails_fails_the_test():
    with pytest.raises(AssertionError, match="no more"):
        run_on_ranks(_fail, 2)


def test_the_largest_items_are_shared_out_first():
    owners = share_out({"a": 4, "b": 3, "c": 3, "d": 2}, 2)
    loads = [sum(size for name, size in (("a", 4), ("b", 3), ("c", 3), ("d", 2)) if owners[name] == rank) for rank in (0, 1)]
    assert loads == [6, 6]
    assert share_out({"b": 1, "a": 1}, 3) == {"a": 0, "b": 1}
