import pytest
import torch

from algorithms.numerics.activations.hadamard import hadamard, random_signs, times_hadamard
from algorithms.numerics.randomness import keyed_generator

# Sylvester, Paley I over primes and over GF(27), GF(343), Paley II over primes and over GF(9), GF(25), GF(49), and products.
ORDERS = (1, 2, 4, 64, 12, 24, 28, 44, 60, 344, 20, 36, 52, 76, 100, 40, 80, 96, 160, 576, 896)


@pytest.mark.parametrize("order", ORDERS)
def test_the_matrices_are_orthogonal_and_flat(order):
    matrix = hadamard(order)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-13, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-15, rtol=0)


def test_powers_of_two_are_sylvesters():
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    torch.testing.assert_close(hadamard(32) * 32**0.5, torch.tensor(signs, dtype=torch.float64))


def test_the_sizes_of_well_known_models_are_covered():
    hidden = (576, 768, 896, 1024, 1152, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 4544, 4608, 5120, 5376, 6144, 6656)
    for order in (*hidden, 7168, 8192, 12288, 16384, 18432):
        row = torch.zeros(1, order, dtype=torch.float64)
        row[0, order // 3] = 1
        turned = times_hadamard(row)
        torch.testing.assert_close(turned.abs(), torch.full_like(row, order**-0.5), atol=1e-14, rtol=0)


@pytest.mark.parametrize("order", [1, 16, 12, 40, 112, 256, 1024, 896])
def test_the_fast_product_is_the_matrix_product(order):
    generator = torch.Generator().manual_seed(order)
    matrix = torch.randn(3, 5, order, generator=generator, dtype=torch.float64)
    scales = torch.randn(order, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(times_hadamard(matrix), matrix @ hadamard(order), atol=1e-12, rtol=0)
    torch.testing.assert_close(times_hadamard(matrix, scales=scales), (matrix * scales) @ hadamard(order), atol=1e-12, rtol=0)


def test_many_rows_in_pieces_are_as_one(monkeypatch):
    matrix = torch.randn(37, 24, dtype=torch.float64)
    whole = times_hadamard(matrix)
    monkeypatch.setattr("algorithms.numerics.activations.hadamard._CHUNK", 100)
    torch.testing.assert_close(times_hadamard(matrix), whole, atol=1e-14, rtol=0)


def test_products_are_computed_in_float64_whatever_the_dtype():
    matrix = torch.randn(8, 64).bfloat16()
    exact = matrix.double() @ hadamard(64)
    assert torch.equal(times_hadamard(matrix), exact.bfloat16())
    assert torch.equal(times_hadamard(matrix, dtype=torch.float32), exact.float())


@pytest.mark.parametrize(("order", "nearest"), [(92, "88 and 96"), (3, "2 and 4"), (156, "152 and 160"), (0, "1 and 1")])
def test_an_order_without_a_construction_names_those_beside_it(order, nearest):
    with pytest.raises(ValueError, match=f"rotation needs a Hadamard matrix of order {order}, .* are {nearest}"):
        hadamard(order)


def test_an_outlier_channel_is_spread_over_all():
    hidden = torch.randn(512, 896, generator=torch.Generator().manual_seed(0))
    hidden[:, 77] *= 60
    signs = random_signs(896, keyed_generator(0, "rotation"))
    for turned in (times_hadamard(hidden), times_hadamard(hidden, scales=signs)):
        assert _kurtosis(hidden) > 100
        assert _kurtosis(turned) < 4  # 3 for a normal distribution
        torch.testing.assert_close(turned.norm(dim=1), hidden.norm(dim=1))


def test_signs_are_fair():
    signs = random_signs(4096, keyed_generator(0, "rotation"))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / 64  # four standard deviations
    assert torch.equal(signs, random_signs(4096, keyed_generator(0, "rotation")))


def _kurtosis(rows: torch.Tensor) -> float:
    """Fourth moment over the squared second, of a token's channels: the mean over tokens."""
    return ((rows**4).mean(1) / (rows**2).mean(1) ** 2).mean().item()
