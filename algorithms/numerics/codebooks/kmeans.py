"""Lloyd's algorithm and the residual k-means that starts additive codebooks (spec: AQLM, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import CodewordScatter
from algorithms.numerics.codebooks.nearest import lowest_score
from algorithms.numerics.spread import WHOLE, Spread

# Lloyd's algorithm ends when an iteration gains less: the codebooks are solved exactly afterwards, and iterating to a
# standstill takes most of the time of a fit without lowering its final error.
_SMALLEST_GAIN = 0.005
_LARGEST_FLAT = 1024


def nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre [K, d] of every point [N, d]: squared distances [N] and indices [N]."""
    scores, labels = lowest_score(points, centers, centers.square().sum(1))
    return scores + points.square().sum(1), labels


def kmeans(
    points: Tensor, num_centers: int, *, max_iterations: int, generator: torch.Generator, spread: Spread = WHOLE
) -> Tensor:
    """Centres [num_centers, d] of points [N, d] by Lloyd's algorithm from distinct random points, until it gains little.

    A centre that loses its last point keeps its place. With fewer points than centres the surplus centres are zero rows,
    which no point is nearer to than to itself: the codebook keeps its stated size. Points may be ``spread`` over processes.

    Raises:
        ValueError: no points at all.
    """
    first, count = spread.number(points)
    if count == 0:
        raise ValueError("k-means needs at least one point")
    centers = spread.fetch(torch.randperm(count, generator=generator)[:num_centers], points, first)
    previous = math.inf
    for _ in range(max_iterations):
        distances, labels = nearest(points, centers)
        total = torch.sum(distances, dtype=torch.float64)
        counts = torch.bincount(labels, minlength=centers.shape[0])
        sums = CodewordScatter(labels[:, None], centers.shape[0])(points)
        spread.sum_(total, counts, sums)  # in one message: small matrices wait longer for it than they compute
        distortion = total.item()
        if distortion >= (1 - _SMALLEST_GAIN) * previous:
            break
        previous = distortion
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
    padding = centers.new_zeros(num_centers - centers.shape[0], centers.shape[1])
    return torch.cat([centers, padding])


def tree_kmeans(
    points: Tensor,
    everything: Tensor,
    num_centers: int,
    *,
    max_iterations: int,
    generator: torch.Generator,
    spread: Spread = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Centres by k-means in two levels: about sqrt(num_centers) cells, then each cell's share of the centres from its points.

    The cost per point falls from num_centers to twice its square root. A point is given the nearest centre of its own cell,
    which a later search over all codewords puts right.

    Args:
        points: what the centres are computed from, [N, d].
        everything: what is to be labelled, [P, d].
        num_centers: total number of centres.
        max_iterations: bound on the iterations of each k-means.
        generator: decides the starting points.
        spread: over processes, of the points and of what is to be labelled.

    Returns:
        Centres [num_centers, d] and labels [P].
    """
    options = {"max_iterations": max_iterations, "generator": generator, "spread": spread}
    coarse = kmeans(points, math.isqrt(num_centers), **options)
    inside, cells = nearest(points, coarse)[1], nearest(everything, coarse)[1]
    counts = torch.bincount(inside, minlength=coarse.shape[0])
    spread.sum_(counts)
    counts = counts.cpu()
    shares = _shares(counts, num_centers)
    centers, labels, first = [], torch.empty_like(cells), 0
    for cell, share in enumerate(shares):
        members, labelled = points[inside == cell], torch.nonzero(cells == cell).flatten()
        fine = kmeans(members, share, **options) if counts[cell] else coarse[cell].repeat(share, 1)
        centers.append(fine)
        if labelled.numel():
            labels[labelled] = nearest(everything[labelled], fine)[1] + first
        first += share
    return torch.cat(centers), labels


def _shares(counts: Tensor, total: int) -> list[int]:
    """Whole shares of ``total`` in proportion to the counts, at least one each."""
    exact = counts.double() / counts.sum() * (total - counts.numel())
    shares = exact.floor().long()
    largest = torch.argsort(exact - shares, descending=True, stable=True)[: total - counts.numel() - int(shares.sum())]
    shares[largest] += 1
    return (shares + 1).tolist()


def residual_kmeans(
    points: Tensor,
    num_codebooks: int,
    num_codewords: int,
    *,
    max_iterations: int,
    max_points: int | None,
    generator: torch.Generator,
    spread: Spread = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Codebooks [M, K, d] and codes [N, M] of points [N, d]: each codebook clusters what the earlier ones left over.

    ``max_points`` limits the random subset that the centres are computed from; every point gets its codes. Points may be
    ``spread`` over processes, each of which gets all codebooks and the codes of its own points.
    """
    residual = points.clone()
    first, count = spread.number(points)
    options = {"max_iterations": max_iterations, "generator": generator, "spread": spread}
    codebooks, codes = [], []
    for _ in range(num_codebooks):
        sample = residual
        if max_points is not None and max_points < count:
            sample = residual[spread.own(torch.randperm(count, generator=generator)[:max_points], residual, first)]
        if num_codewords > _LARGEST_FLAT:
            centers, labels = tree_kmeans(sample, residual, num_codewords, **options)
        else:
            centers = kmeans(sample, num_codewords, **options)
            labels = nearest(residual, centers)[1]
        residual -= centers[labels]
        codebooks.append(centers)
        codes.append(labels)
    return torch.stack(codebooks), torch.stack(codes, dim=1)
