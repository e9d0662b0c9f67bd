import pytest
import torch

from algorithms.numerics.codebooks.additive import CodewordScatter, code_rows, group, quadratic_error, sum_codewords, ungroup
from algorithms.quantization.aqlm.weight import stored_bits
from tests.support.matrices import problem, random_codes


@pytest.mark.parametrize("group_shape", [(1, 4), (2, 4), (4, 2)])
def test_dequantize_equals_the_definition_tile_by_tile(group_shape):
    weight = random_codes(8, 16, num_codebooks=3, num_codewords=5, group_shape=group_shape)
    og, ig = group_shape
    expected = torch.zeros(8, 16)
    for a in range(8 // og):
        for b in range(16 // ig):
            tile = sum(weight.codebooks[m, weight.codes[a, b, m]] for m in range(3)) * weight.scales[a]
            expected[a * og : (a + 1) * og, b * ig : (b + 1) * ig] = tile
    torch.testing.assert_close(weight.dequantize(), expected)


def test_group_and_ungroup_are_inverse():
    matrix = torch.randn(6, 12)
    assert torch.equal(ungroup(group(matrix, (2, 3)), (2, 3)), matrix)


def test_scatter_is_the_adjoint_of_sum_codewords():
    weight = random_codes(8, 16, num_codebooks=2, num_codewords=7)
    rows = code_rows(weight.codes, 7)
    codebooks, vectors = torch.randn(14, 4, dtype=torch.float64), torch.randn(32, 4, dtype=torch.float64)
    forward = torch.sum(sum_codewords(rows, codebooks) * vectors)
    backward = torch.sum(codebooks * CodewordScatter(rows, 14)(vectors))
    torch.testing.assert_close(forward, backward)


def test_quadratic_error_is_the_mean_squared_output_error():
    difference, _ = problem(6, 8)
    inputs = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    hessian = inputs.T @ inputs / 50
    direct = (inputs.double() @ difference.double().T).square().sum(1).mean().item()
    assert quadratic_error(difference, hessian) == pytest.approx(direct, rel=1e-5)


@pytest.mark.parametrize(("shape", "average"), [((4096, 4096), 2.50), ((4096, 11008), 2.19), ((11008, 4096), 2.19)])
def test_bits_of_published_shapes(shape, average):
    rows, columns = shape
    bits = stored_bits((rows, columns // 8, 1), (1, 1 << 16, 1, 8))
    assert round(sum(bits.values()) / (rows * columns), 2) == average
