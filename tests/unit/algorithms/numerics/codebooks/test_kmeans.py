import pytest
import torch

from algorithms.numerics.codebooks.kmeans import kmeans, nearest, residual_kmeans, tree_kmeans


def _generator():
    return torch.Generator().manual_seed(0)


def test_nearest_equals_brute_force():
    points, centers = torch.randn(200, 3), torch.randn(17, 3)
    distances, labels = nearest(points, centers)
    exact = torch.cdist(points.double(), centers.double()).min(1)
    assert torch.equal(labels, exact.indices)
    torch.testing.assert_close(distances.double(), exact.values.square(), atol=1e-5, rtol=1e-5)


def test_separated_clusters_are_found_exactly():
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = means.repeat_interleave(50, 0) + 0.1 * torch.randn(150, 2, generator=_generator())
    best = min(
        (kmeans(points, 3, max_iterations=50, generator=torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda centers: torch.cdist(points, centers).min(1).values.sum().item(),
    )
    order = best.sum(1).argsort()
    expected = torch.stack([points[i * 50 : (i + 1) * 50].mean(0) for i in range(3)])
    torch.testing.assert_close(best[order[0]], expected[0])
    assert torch.cdist(expected, best).min(1).values.max() < 1e-4


def test_an_empty_centre_keeps_its_place():
    points = torch.zeros(10, 2)
    points[9] = 5.0
    centers = kmeans(points, 10, max_iterations=5, generator=_generator())
    # Nine centres start on the same point; only the first of them has members, the others stay where they are.
    assert torch.equal(centers.unique(dim=0), points.unique(dim=0))


def test_fewer_points_than_centres_pads_the_codebook_and_is_exact():
    points = torch.randn(5, 4)
    codebooks, codes = residual_kmeans(points, 2, 16, max_iterations=10, max_points=None, generator=_generator())
    assert codebooks.shape == (2, 16, 4)
    torch.testing.assert_close(codebooks[0][codes[:, 0]] + codebooks[1][codes[:, 1]], points)


def test_a_second_codebook_lowers_the_error():
    points = torch.randn(500, 4, generator=_generator())
    errors = []
    for count in (1, 2, 3):
        codebooks, codes = residual_kmeans(points, count, 16, max_iterations=30, max_points=None, generator=_generator())
        errors.append((points - sum(codebooks[m][codes[:, m]] for m in range(count))).square().sum().item())
    assert errors[0] > errors[1] > errors[2]


def test_a_subset_trains_and_every_point_is_coded():
    codebooks, codes = residual_kmeans(torch.randn(300, 2), 1, 8, max_iterations=5, max_points=40, generator=_generator())
    assert codes.shape == (300, 1)
    assert codebooks.shape == (1, 8, 2)


def test_no_points_is_an_error():
    with pytest.raises(ValueError, match="at least one point"):
        kmeans(torch.zeros(0, 2), 4, max_iterations=1, generator=_generator())


def test_two_levels_come_close_to_one_and_label_within_their_cell():
    points = torch.randn(20000, 4, generator=_generator())
    flat = kmeans(points, 1024, max_iterations=20, generator=_generator())
    centers, labels = tree_kmeans(points, points, 1024, max_iterations=20, generator=_generator())
    assert centers.shape == (1024, 4)
    assert labels.max() == 1023
    best = nearest(points, flat)[0].sum()
    assert nearest(points, centers)[0].sum() < 1.1 * best
    assert (points - centers[labels]).square().sum() < 1.2 * best


def test_two_levels_with_fewer_points_than_centres_are_exact():
    points = torch.randn(50, 3, generator=_generator())
    centers, labels = tree_kmeans(points, points, 2048, max_iterations=20, generator=_generator())
    assert centers.shape == (2048, 3)
    torch.testing.assert_close(centers[labels], points)
