import torch

from algorithms.numerics.spread import WHOLE, Spread
from tests.support.rank_processes import run_on_ranks

ROWS = torch.arange(14).view(7, 2)
CHOSEN = torch.tensor([6, 0, 3])


def _fetch(ranks, counts):
    spread = Spread(index=ranks.rank, count=ranks.size, sum_=ranks.sum_)
    rows = ROWS.split(counts)[ranks.rank]
    first, total = spread.number(rows)
    own = spread.own(CHOSEN, rows, first)
    return first, total, rows[own].tolist(), spread.fetch(CHOSEN, rows, first)


def test_rows_are_numbered_and_fetched_over_all_processes():
    places = run_on_ranks(_fetch, 3, [4, 0, 3])
    assert [first for first, *_ in places] == [0, 4, 4]
    assert [total for _, total, *_ in places] == [7, 7, 7]
    assert [own for _, _, own, _ in places] == [[[0, 1], [6, 7]], [], [[12, 13]]]
    assert all(torch.equal(fetched, ROWS[CHOSEN]) for *_, fetched in places)


def test_one_process_has_all_rows():
    assert WHOLE.number(ROWS) == (0, 7)
    assert torch.equal(WHOLE.own(CHOSEN, ROWS, 0), CHOSEN)
    assert torch.equal(WHOLE.fetch(CHOSEN, ROWS, 0), ROWS[CHOSEN])


def test_runs_are_all_rows():
    for count, size, together in ((7, 2, 1), (8, 3, 1), (2, 3, 1), (64, 3, 16), (70, 2, 16)):
        runs = [Spread(index=index, count=size).run_of(count, together) for index in range(size)]
        assert [row for run in runs for row in range(count)[run]] == list(range(count))
        assert all(run.start % together == 0 for run in runs)
        assert max(run.stop - run.start for run in runs) < count / size + 2 * together
