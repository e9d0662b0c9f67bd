from statistics import NormalDist

import pytest
import torch

from algorithms.numerics.residuals.nf import NormalFloatCoder, TableColumns, normal_float
from algorithms.numerics.residuals.vector_columns import VectorColumns
from tests.support.matrices import problem

# As published (QLoRA, arXiv 2305.14314, appendix E).
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_table_of_four_bits_is_the_published_one():
    torch.testing.assert_close(normal_float(4), torch.tensor(NF4), atol=2e-6, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_quantiles_of_the_normal_distribution(bits):
    table, half = normal_float(bits).tolist(), 1 << (bits - 1)
    assert table == sorted(table)
    assert (len(table), table[0], table[half - 1], table[-1]) == (2 * half, -1.0, 0.0, 1.0)
    quantile = NormalDist().inv_cdf
    for count, side in ((half, table[half:]), (half - 1, [-value for value in reversed(table[: half - 1])])):
        ends = [quantile(0.5 + (0.9677083 - 0.5) * place / count) for place in range(1, count + 1)]
        assert side == pytest.approx([end / ends[-1] for end in ends], abs=1e-5)


def test_each_row_has_the_scale_and_the_codes_that_an_exhaustive_search_finds():
    matrix = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    coded = NormalFloatCoder(3, rounds=0).encode(matrix, None, torch.Generator())
    table = normal_float(3)
    for row, got in zip(matrix, coded.dequantize(), strict=True):
        largest, errors = row.abs().max(), []
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            errors.append((row[:, None] - share * largest * table).square().amin(1).sum().item())
        # The scale is stored in eight bits.
        assert (row - got).square().sum().item() == pytest.approx(min(errors), rel=0.02)


def test_runs_of_a_row_have_scales_of_their_own():
    matrix = problem(8, 200)[0]
    matrix[:, 100:] *= 50
    coded = NormalFloatCoder(4).encode(matrix, None, torch.Generator())
    assert coded.movable()["scales"].shape == (8, 4)
    error = (matrix - coded.dequantize())[:, :50]
    assert error.square().mean() < 0.2 * matrix[:, :50].square().mean()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_value_of_the_table_is_found_as_by_a_search_over_all(bits):
    generator = torch.Generator().manual_seed(bits)
    table, scales = normal_float(bits)[:, None], torch.rand(3, 500, generator=generator)
    scales[1, :7] = 0
    found, searched = TableColumns(table, scales), VectorColumns(table, scales)
    for place in range(3):
        column = torch.randn(500, generator=generator)
        torch.testing.assert_close(found.requantize(place, column), searched.requantize(place, column), atol=0, rtol=0)
    assert torch.equal(found.codes, searched.codes)
    assert torch.equal(found.values(), searched.values())
