import torch

from algorithms.numerics.column_order import column_order
from tests.support.matrices import problem


def test_the_identity_is_no_order():
    assert column_order("identity", *problem(4, 8)) is None


def test_the_largest_diagonal_comes_first_and_equal_ones_stay_in_order():
    _, hessian = problem(4, 12)
    hessian[7, 7] = hessian[2, 2] = hessian.diagonal().max() + 1
    expected = sorted(range(12), key=lambda column: -hessian[column, column].item())
    assert column_order("act_order", torch.zeros(4, 12), hessian).tolist() == expected
    assert expected[:2] == [2, 7]


def _ranks(column):
    """Ranks of distinct numbers, by counting those that are smaller."""
    return [sum(other < value for other in column) for value in column]


def _rank_correlation(a, b):
    """Spearman's coefficient of distinct numbers, 1 - 6 sum d^2 / (n (n^2 - 1))."""
    n = len(a)
    squares = sum((x - y) ** 2 for x, y in zip(_ranks(a), _ranks(b), strict=True))
    return 1 - 6 * squares / (n * (n * n - 1))


def test_spearman_follows_each_column_by_the_one_most_like_it():
    matrix, hessian = problem(11, 17, seed=3)
    columns, order = matrix.T.tolist(), [0]
    while len(order) < 17:
        rest = [column for column in range(17) if column not in order]
        order.append(max(rest, key=lambda column: _rank_correlation(columns[order[-1]], columns[column])))
    assert column_order("spearman", matrix, hessian).tolist() == order


def test_spearman_sees_ranks_and_not_sizes():
    matrix, hessian = problem(11, 17, seed=3)
    assert torch.equal(column_order("spearman", matrix.exp(), hessian), column_order("spearman", matrix, hessian))
