import pytest
import torch

from algorithms.numerics.residuals.neural.patches import Patches, as_pixels, block_scales, from_pixels, patch_size, spread
from algorithms.numerics.residuals.neural.target import LOSSES, Target
from tests.support.matrices import problem


@pytest.mark.parametrize("shape", [(64, 32), (37, 83), (5, 70), (16, 16)])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_frames_hold_every_weight_at_its_place_and_come_back(shape, size):
    matrix = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    patches = Patches(shape=shape, size=size)
    frames = patches.cut(matrix)
    assert frames.shape == (patches.count, 1, size, size)
    assert torch.equal(patches.joined(frames), matrix)
    across = -(-shape[1] // size)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        frame = frames[row // size * across + column // size, 0]
        assert frame[row % size, column % size] == matrix[row, column]
    assert (frames == 0).sum() == frames.numel() - matrix.numel()
    assert patches.padding == pytest.approx(frames.numel() / matrix.numel() - 1)


@pytest.mark.parametrize(
    ("shape", "stride", "size"),
    [
        ((4096, 4096), 2, 256),  # 512 would be bands of more than 2^20 values
        ((2048, 2048), 2, 256),  # 512 would be 16 frames
        ((384, 128), 2, 32),
        ((64, 128), 2, 16),
        ((100, 100), 2, 8),  # 16 would pad by a quarter
        ((5, 7), 2, 4),
        ((384, 128), 32, 32),
        ((16, 16), 32, 32),
        ((90, 90), 3, 12),
    ],
)
def test_a_patch_fits_and_gives_enough_frames(shape, stride, size):
    assert patch_size(shape, stride) == size


def test_pixels_lie_between_zero_and_one_and_come_back():
    matrix = problem(9, 50)[0]
    matrix[3, :20] = 0
    scales = block_scales(matrix, 20)
    wide = spread(scales.decode().view(9, -1), (9, 50))
    for row in range(9):
        for start in (0, 17, 34):  # 50 columns in three runs
            run = slice(start, start + 17)
            largest = matrix[row, run].abs().max().item()
            assert wide[row, run].unique().numel() == 1
            # Eight bits between the smallest and the largest of all.
            assert wide[row, run][0].item() == pytest.approx(largest, abs=0.02)
    pixels = as_pixels(matrix, wide)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    cut = torch.maximum(torch.minimum(matrix, wide), -wide)
    torch.testing.assert_close(from_pixels(pixels, wide), cut, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_what_their_names_say(loss):
    matrix, hessian = problem(11, 13)
    scales = torch.rand(11, 13, generator=torch.Generator().manual_seed(1)) + 4
    patches = Patches(shape=(11, 13), size=8)
    target = Target(matrix, scales, patches, hessian, loss)
    frames = torch.rand(patches.count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    pixels = patches.joined(frames).double()

    def size(pixels):
        if loss == "l2":
            return (pixels - as_pixels(matrix, scales).double()).square().sum()
        error = (2 * pixels - 1) * scales.double() - matrix.double()
        weight = hessian.double() if loss == "hessian" else hessian.double().diagonal().diag()
        return torch.trace(error @ weight @ error.T)

    wanted = size(pixels) / size(torch.full_like(pixels, 0.5))
    found = sum(target.loss(frames[batch], batch) for batch in target.batches(3))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    bands = [[0, 1], [2, 3]] if loss == "hessian" else [[0, 1, 2], [3]]
    assert [batch.tolist() for batch in target.batches(3)] == bands
