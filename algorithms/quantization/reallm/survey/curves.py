"""What a survey measures of one matrix: errors by code and by rank, and what an error does to the hidden states.

Two curves, under the Hessian of the matrix's input: the error of each way to code the residual without a low-rank part, and the
error at each of a few ranks with one of them. What both do together is taken as their product; ranks in between lie on straight
lines of the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from algorithms.formats.reallm.packed import stored_bits
from algorithms.numerics.low_rank.allocation import Option
from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.factors import HALF, LowRank
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.numerics.randomness import keyed_generator
from algorithms.quantization.reallm.config import AQLM, NERV, NF, VQ, ReallmConfig
from algorithms.quantization.reallm.shapes import DECODER_BITS, Shape, coder

# (bits of a code, weights that share it): as many as fit a codebook of 256, and cheaper books for small matrices.
_CODES: Mapping[str, Sequence[tuple[int, int]]] = {
    VQ: ((4, 4), (6, 4), (8, 4), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2), (8, 2), (5, 1), (6, 1)),
    NF: ((2, 1), (3, 1), (4, 1)),
    NERV: tuple((bits, 1) for bits in DECODER_BITS),
    AQLM: ((4, 4), (6, 4), (8, 4), (4, 2), (6, 2), (8, 2), (12, 4), (16, 4), (16, 8), (24, 8)),
}
_PROBE = {VQ: (4, 2), NF: (3, 1), AQLM: (4, 2), NERV: (3, 1)}  # the code that ranks are measured with
_RANKS = (1, 4, 16, 64)
_WIDEST_BOOK = 8  # bits; longer codes have several
_MOST_BOOK_BITS = 0.5  # a weight


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Of one matrix: bits and relative error of each code without a low-rank part; by rank, what multiplies that error.

    ``effect`` is what a relative error of one would do to the hidden states behind the block: the mean over tokens of the
    squared change over the squared length.
    """

    codes: Mapping[tuple[int, int], tuple[int, float]]
    ranks: Mapping[int, float]
    shape: tuple[int, int]
    effect: float = 1.0

    def options(self, factor_bits: int) -> dict[Shape, Option]:
        """What every shape costs, in bits and in changes of hidden states."""
        ranks = sorted(self.ranks)
        found = {}
        for rank in range(ranks[-1] + 1):
            below = max(known for known in ranks if known <= rank)
            above = min(known for known in ranks if known >= rank)
            share = 0.0 if above == below else (rank - below) / (above - below)
            factor = self.ranks[below] ** (1 - share) * self.ranks[above] ** share * self.effect
            size = LowRank.stored_size(self.shape, rank, factor_bits)
            for (code_bits, bucket), (bits, error) in self.codes.items():
                shape = Shape(rank=rank, code_bits=code_bits, bucket=bucket)
                found[shape] = Option(bits=bits + size, error=error * factor)
        return found

    def to_json(self) -> dict[str, object]:
        """The same in what JSON has."""
        return {**asdict(self), "codes": [[*code, *found] for code, found in self.codes.items()]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Curves:
        """The inverse of :meth:`to_json`, of what a file holds."""
        rows, columns = stored["shape"]
        return cls(
            codes={(code_bits, bucket): (bits, error) for code_bits, bucket, bits, error in stored["codes"]},
            ranks={int(rank): factor for rank, factor in stored["ranks"].items()},
            shape=(rows, columns),
            effect=stored["effect"],
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A matrix [O, I] as one code leaves it, and its relative ``error``."""

    matrix: Tensor
    error: float


def measure(matrix: Tensor, hessian: Tensor, config: ReallmConfig, where: Sequence[object]) -> tuple[Curves, Probe]:
    """Both curves of one matrix [O, I] under H [I, I], of effect one, and its probe; ``where`` keys the randomness."""
    shape = (matrix.shape[0], matrix.shape[1])
    power = max(torch.sum((matrix @ hessian).double() * matrix).item(), torch.finfo(torch.float32).tiny)
    probes: list[Probe] = []

    def _fit(code: tuple[int, int], rank: int) -> tuple[int, float]:
        found = alternate(
            matrix,
            hessian,
            coder(Shape(rank=rank, code_bits=code[0], bucket=code[1]), config, surveys=True),
            keyed_generator(config.seed, "reallm survey", *where),
            rank=rank,
            factor_bits=config.low_rank_bits,
            iterations=1,
        )
        error = found.errors[-1] / power
        if (code, rank) == (probe, 0):
            probes.append(Probe(matrix=found.dequantize(), error=error))
        nothing = LowRank.zero(shape, config.low_rank_bits, matrix.device)
        weight = LowRankWeight.of(replace(found, low_rank=nothing), config.residual)
        return sum(stored_bits(weight).values()), error

    probe = _PROBE[config.residual]
    tried, known_ranks = surveyed(shape, config)
    codes = {code: _fit(code, 0) for code in tried}
    start = codes[probe][1]
    ranks = {0: 1.0}
    for rank in known_ranks:
        share = _fit(probe, rank)[1] / start if start > 0 else 1.0
        ranks[rank] = min(share, ranks[max(ranks)]) if math.isfinite(share) else ranks[max(ranks)]
    return Curves(codes=codes, ranks=ranks, shape=shape), probes[0]


def surveyed(shape: tuple[int, int], config: ReallmConfig) -> tuple[list[tuple[int, int]], list[int]]:
    """The codes and the ranks that are measured of a matrix of ``shape`` (O, I)."""
    residual, most = config.residual, _MOST_BOOK_BITS * shape[0] * shape[1]
    codes = [
        (bits, bucket)
        for bits, bucket in _CODES[residual]
        # A codebook has to leave enough of the bits to the codes.
        if residual == NF or (bits, bucket) == _PROBE[residual] or HALF * bucket << min(bits, _WIDEST_BOOK) < most
    ]
    return codes, [rank for rank in _RANKS if rank <= min(shape) // 2]
