"""Lloyd's algorithm and the residual k-means that starts additive codebooks (spec: AQLM, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from algorithms.numerics.additive import CodewordScatter

_MAX_SCORES = 1 << 22
# Lloyd's algorithm ends when an iteration gains less: the codebooks are solved exactly afterwards, and iterating to a
# standstill takes most of the time of a fit without lowering its final error.
_SMALLEST_GAIN = 0.005


def nearest(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre [K, d] of every point [N, d]: squared distances [N] and indices [N]; ties go to the lower index."""
    offsets = centers.square().sum(1)
    rows = max(1, _MAX_SCORES // centers.shape[0])
    parts = [torch.addmm(offsets, chunk, centers.T, alpha=-2).min(1) for chunk in points.split(rows)]
    distances = torch.cat([part.values for part in parts]) + points.square().sum(1)
    return distances, torch.cat([part.indices for part in parts])


def kmeans(points: Tensor, num_centers: int, *, max_iterations: int, generator: torch.Generator) -> Tensor:
    """Centres [num_centers, d] of points [N, d] by Lloyd's algorithm from distinct random points, until it gains little.

    A centre that loses its last point keeps its place. With fewer points than centres the surplus centres are zero rows,
    which no point is nearer to than to itself: the codebook keeps its stated size.

    Raises:
        ValueError: no points at all.
    """
    if points.shape[0] == 0:
        raise ValueError("k-means needs at least one point")
    chosen = torch.randperm(points.shape[0], generator=generator)[:num_centers].to(points.device)
    centers = points[chosen].clone()
    previous = math.inf
    for _ in range(max_iterations):
        distances, labels = nearest(points, centers)
        distortion = torch.sum(distances, dtype=torch.float64).item()
        if distortion >= (1 - _SMALLEST_GAIN) * previous:
            break
        previous = distortion
        counts = torch.bincount(labels, minlength=centers.shape[0])
        sums = CodewordScatter(labels[:, None], centers.shape[0])(points)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centers)
    padding = centers.new_zeros(num_centers - centers.shape[0], centers.shape[1])
    return torch.cat([centers, padding])


def residual_kmeans(
    points: Tensor,
    num_codebooks: int,
    num_codewords: int,
    *,
    max_iterations: int,
    max_points: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Codebooks [M, K, d] and codes [N, M] of points [N, d]: each codebook clusters what the earlier ones left over.

    ``max_points`` limits the random subset that the centres are computed from; every point gets its codes.
    """
    residual = points.clone()
    codebooks, codes = [], []
    for _ in range(num_codebooks):
        sample = residual
        if max_points is not None and max_points < residual.shape[0]:
            chosen = torch.randperm(residual.shape[0], generator=generator)[:max_points]
            sample = residual[chosen.to(residual.device)]
        centers = kmeans(sample, num_codewords, max_iterations=max_iterations, generator=generator)
        _, labels = nearest(residual, centers)
        residual -= centers[labels]
        codebooks.append(centers)
        codes.append(labels)
    return torch.stack(codebooks), torch.stack(codes, dim=1)
