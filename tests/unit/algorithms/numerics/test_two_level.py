import pytest
import torch

from algorithms.numerics.sparse_quantized import Statistics
from algorithms.numerics.two_level import join_groups, quantize_statistics


def _values(rows, seed=0, low=0.01, high=0.05):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("run", [1, 4, 16])
def test_every_code_is_the_nearest_of_all(bits, run):
    values = _values(32)
    found = quantize_statistics(values, bits=bits, run=run)
    decoded, top = found.decode()[:, 0], (1 << bits) - 1
    assert found.codes.shape == (32, 1)
    assert found.run_scales.shape == found.run_zeros.shape == (32 // run, 1)
    for row in range(32):
        inside = values[row // run * run : (row // run + 1) * run].double()
        scale, zero = (part[row // run, 0].double() for part in (found.run_scales, found.run_zeros))
        grid = scale * (torch.arange(top + 1, dtype=torch.float64) - zero)
        assert (decoded[row].double() - values[row]).abs() <= (grid - values[row].double()).abs().min() + 1e-9
        # The grid spans the run, to the rounding of its scale and zero to float16.
        if run > 1:
            span = inside.max() - inside.min()
            assert scale * top == pytest.approx(span.item(), rel=2**-10)
            assert (grid[0] - inside.min()).abs() <= 2**-10 * inside.min() + 1e-7
    for part in (found.run_scales, found.run_zeros):
        assert torch.equal(part, part.half().float())


def test_decoding_follows_the_formula():
    found = Statistics(
        codes=torch.tensor([[0, 1], [2, 3], [1, 0]], dtype=torch.uint8),
        run_scales=torch.tensor([[0.5, 1.0], [2.0, 4.0]]),
        run_zeros=torch.tensor([[1.0, 0.0], [-1.0, 2.0]]),
        bits=2,
        run=2,
    )
    assert found.decode().tolist() == [[-0.5, 1.0], [0.5, 3.0], [4.0, -8.0]]


def test_a_last_run_that_is_short_has_the_grid_of_its_own_rows():
    values = _values(21)
    found, alone = quantize_statistics(values, bits=3, run=16), quantize_statistics(values[16:], bits=3, run=5)
    assert found.run_scales.shape == (2, 1)
    assert torch.equal(found.run_scales[1], alone.run_scales[0])
    assert torch.equal(found.decode()[16:], alone.decode())
    assert torch.equal(found.decode()[:16], quantize_statistics(values[:16], bits=3, run=16).decode())


def test_a_symmetric_second_level_reaches_as_far_on_both_sides():
    values = torch.tensor([-3.0, 1.0, 0.5, -0.25, 0.5, 0.75, 2.0, 0.25])
    found = quantize_statistics(values, bits=3, run=4, symmetric=True)
    assert found.run_scales[0, 0] * 7 == pytest.approx(6.0, rel=2**-10)
    assert found.run_zeros[0, 0] == pytest.approx(3.5, rel=2**-10)
    assert found.run_scales[1, 0] * 7 == pytest.approx(2.0, rel=2**-10)  # without negative numbers it begins at zero
    assert found.run_zeros[1, 0] == 0
    for start, grid in ((0, torch.linspace(-3, 3, 8)), (4, torch.linspace(0, 2, 8))):
        inside = values[start : start + 4]
        nearest = (inside[:, None] - grid).abs().amin(1)
        torch.testing.assert_close((found.decode()[start : start + 4, 0] - inside).abs(), nearest, atol=3e-3, rtol=0)


@pytest.mark.parametrize("base", [1e-6, 6.1e-5, 0.02, 1.0, 100.0, 3e4])
@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_spread_that_is_small_beside_the_values_stays_close(base, spread, sign):
    values = sign * base * (1 + spread * _values(16, low=0.0, high=1.0))
    found = quantize_statistics(values, bits=3, run=16)
    decoded = found.decode()[:, 0]
    assert torch.isfinite(found.run_scales).all()
    assert torch.isfinite(found.run_zeros).all()
    assert torch.isfinite(found.run_zeros.half()).all()
    step = max(base * spread / 7, 2**-24)
    assert (decoded - values).abs().max() <= 2**-10 * base + step


@pytest.mark.parametrize("value", [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 128.0])
def test_a_power_of_two_in_every_row_is_exact(value):
    """Symmetric grids have such a zero everywhere, and formats that do not store it rely on it."""
    found = quantize_statistics(torch.full((32,), value), bits=3, run=16)
    assert torch.equal(found.decode(), torch.full((32, 1), value))


def test_zeros_alone_decode_to_next_to_nothing():
    assert quantize_statistics(torch.zeros(16), bits=3, run=16).decode().abs().max() == 0


def test_groups_are_joined_side_by_side():
    parts = [quantize_statistics(_values(20, seed), bits=3, run=16) for seed in range(3)]
    joined = join_groups(parts)
    assert torch.equal(joined.decode(), torch.cat([part.decode() for part in parts], 1))
    assert (joined.bits, joined.run) == (3, 16)
    plain = join_groups([Statistics(values=_values(5, seed)[:, None]) for seed in range(2)])
    assert torch.equal(plain.decode(), torch.stack([_values(5, 0), _values(5, 1)], 1))
