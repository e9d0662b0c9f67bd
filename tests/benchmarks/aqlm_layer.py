"""One linear of real size through the AQLM fit: its error, its time, and where the time goes.

    python -m tests.benchmarks.aqlm_layer --size 4096 --num-codebooks 2 --bits 8 [--threads 1]

The weights are Gaussian with a heavy tail; the Hessian has eigenvalues that fall as a power law over five decades in a random
basis, and a few input channels that are ten times as loud, as the inputs of language models do. For scale, the error is printed
beside that of rounding every row to the same number of bits (round to nearest, one scale a group of 128), and beside what
residual k-means alone leaves.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time

import torch
from torch import Tensor

from algorithms.numerics.codebooks.additive import quadratic_error
from algorithms.numerics.codebooks.additive_fit import AdditiveSettings, fit_additive
from algorithms.numerics.randomness import keyed_generator
from algorithms.quantization.aqlm.weight import stored_bits

PARTS = ("initial_codes", "solve_codebooks", "solve_scales", "coordinate_descent", "beam_search")


def layer(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """W and H, both [size, size]."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator) * torch.rand(size, 1, generator=generator).add(0.5) / size**0.5
    matrix *= 1 + 0.3 * torch.randn(size, size, generator=generator).abs()
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    hessian = (basis * torch.logspace(0, -5, size)) @ basis.T
    loud = torch.ones(size)
    loud[torch.randperm(size, generator=generator)[: max(1, size // 500)]] = 10.0
    return matrix, hessian * loud[:, None] * loud


def rounded(matrix: Tensor, bits: int, group: int = 128) -> Tensor:
    """Round to nearest, symmetric, one scale for ``group`` columns."""
    tiles = matrix.view(matrix.shape[0], -1, group)
    scale = tiles.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return (((tiles / scale - 0.5).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * scale).view_as(matrix)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--num-codebooks", type=int, default=2)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--beam-size", type=int, default=1)
    parser.add_argument("--max-points-per-centroid", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    matrix, hessian = layer(arguments.size, seed=0)
    codewords = 1 << arguments.bits
    per_centroid = arguments.max_points_per_centroid
    settings = AdditiveSettings(
        num_codebooks=arguments.num_codebooks,
        num_codewords=codewords,
        group_shape=(1, arguments.group),
        beam_size=arguments.beam_size,
        relative_tolerance=arguments.tolerance,
        max_points=per_centroid * codewords,
    )
    profile = cProfile.Profile()
    wall, cpu = time.perf_counter(), time.process_time()
    fit = profile.runcall(fit_additive, matrix, hessian, settings, keyed_generator(0, "benchmark"))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    power = quadratic_error(matrix, hessian)
    bits = sum(stored_bits(tuple(fit.weight.codes.shape), tuple(fit.weight.codebooks.shape)).values()) / matrix.numel()
    out = sys.stdout.write
    out(f"{arguments.size} x {arguments.size}, {arguments.num_codebooks} x {arguments.bits} bits, group {arguments.group}: ")
    out(f"{bits:.3f} bits a weight, {len(fit.losses) - 1} continuous steps, {wall:.1f} s wall, {cpu:.1f} s CPU, ")
    out(f"{arguments.threads} thread(s)\n")
    out(f"relative error {fit.losses[-1] / power:.5f} (k-means alone {fit.losses[0] / power:.5f}, ")
    out(f"2-bit rounding in groups of 128 {quadratic_error(matrix - rounded(matrix, 2), hessian) / power:.5f})\n")
    for (_, _, name), (_, calls, _, cumulative, _) in pstats.Stats(profile).stats.items():
        if name in PARTS:
            out(f"  {name}: {cumulative:.1f} s in {calls} calls\n")


if __name__ == "__main__":
    main()
