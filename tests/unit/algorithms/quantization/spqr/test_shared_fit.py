"""SpQR's fit of rows apart from each other, beside that of whole matrices."""

import pytest
import torch

from algorithms.formats.spqr import packed as spqr
from algorithms.numerics.sparse_quantized import SparseQuantized
from algorithms.numerics.spread import Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.quantization.spqr.calibration import fit, splits
from algorithms.quantization.spqr.config import SpqrConfig
from tests.support.matrices import problem
from tests.support.rank_processes import run_on_ranks

COLUMNS = 64


def _config(changes):
    return SpqrConfig.model_validate({"wbits": 3, "groupsize": 16, **changes})


def _problem(rows):
    statistics = InputStatistics(COLUMNS)
    statistics.update(torch.randn(256, COLUMNS, generator=torch.Generator().manual_seed(0)))
    return {name: problem(count, COLUMNS, seed=count)[0] for name, count in rows.items()}, statistics


def _fit(ranks, rows, changes):
    wanted, statistics = _problem(rows)
    config, spread = _config(changes), Spread(index=ranks.rank, count=ranks.size, sum_=ranks.sum_)
    mine = {name: matrix[spread.run_of(matrix.shape[0], 2 * config.run)] for name, matrix in wanted.items()}
    return fit(mine, statistics, config, spread)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"outlier_threshold": 0.05, "permutation_order": "identity"},
        {"outlier_threshold": None, "sym": True},
        {"round_zero": True, "qq_scale_bits": None, "qq_zero_bits": None},
    ],
)
def test_rows_that_ranks_fit_make_up_the_matrix(changes):
    rows = {"q": 96, "k": 72}  # runs of 16 do not divide the second
    wanted, statistics = _problem(rows)
    assert splits(_config(changes))
    whole = fit(wanted, statistics, _config(changes))
    parts = run_on_ranks(_fit, 2, rows, changes)
    for name in rows:
        joined = SparseQuantized.joined([part[name] for part in parts])
        expected, found = spqr.pack(whole[name], name), spqr.pack(joined, name)
        assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in expected.items()}
        assert (joined.dequantize() != whole[name].dequantize()).double().mean() < 0.01


@pytest.mark.parametrize("changes", [{"target_bits": 4.5}, {"max_outlier_share": 0.01}, {"permutation_order": "spearman"}])
def test_what_looks_at_the_whole_matrix_is_not_split(changes):
    assert not splits(_config(changes))
