from dataclasses import fields

import pytest
import torch

from algorithms.numerics.grids.progressive import ProgressiveCodes
from tests.support.quantized_models import progressive_codes


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(5, 48, 16), (3, 256, 128), (4, 32, 32)])
def test_a_weight_is_the_product_of_its_levels(rows, columns, group_size):
    made = progressive_codes(rows, columns, group_size=group_size)
    assert made.group_size == group_size
    dense, integers = made.dequantize(), made.intermediate()
    assert dense.dtype == torch.float32
    assert integers.dtype == torch.int16
    for row in range(rows):
        for column in range(columns):
            group = column // group_size
            scale, zero = made.group_scales[row, group].item(), made.zeros[row, group].item()
            integer = scale * (made.codes[row, column].item() - zero)
            assert -128 <= integer <= 127
            assert integers[row, column] == integer
            # Both factors have at most 11 bits, so that the product is exact in float32.
            assert dense[row, column].item() == made.row_scales[row].item() * integer


def test_a_matrix_by_hand():
    made = ProgressiveCodes(
        codes=torch.tensor([[0, 15, 8, 7]], dtype=torch.uint8),
        row_scales=torch.tensor([0.5]),
        group_scales=torch.tensor([[16, 3]], dtype=torch.uint8),
        zeros=torch.tensor([[8, 8]], dtype=torch.uint8),
    )
    assert made.intermediate().tolist() == [[-128, 112, 0, -3]]
    assert made.dequantize().tolist() == [[-64.0, 56.0, 0.0, -1.5]]


def test_rows_come_apart_and_together():
    made = progressive_codes(7, 64, group_size=16)
    parts = [made.rows(0, 3), made.rows(3, 7)]
    assert torch.equal(parts[1].dequantize(), made.dequantize()[3:])
    joined = ProgressiveCodes.joined(parts)
    for field in fields(made):
        ours, theirs = getattr(joined, field.name), getattr(made, field.name)
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs)), field.name
