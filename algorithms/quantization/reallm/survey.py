"""ReALLM's first stage where bits are shared out: measures every matrix of the original model and chooses its shape.

Two curves are measured for a matrix, under the Hessian of its input: the error of each way to code the residual without a
low-rank part, and the error at each of a few ranks with one of them. What both do together is taken as their product; ranks in
between lie on straight lines of the logarithm.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext, StageError
from algorithms.blockwise.pipeline import linear_shapes
from algorithms.blockwise.stages import TOKENS_PER_BATCH
from algorithms.formats.reallm.packed import stored_bits
from algorithms.modeling.activations import Activations, embed
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.files import folder_digest
from algorithms.modeling.lockstep import BlockWalk
from algorithms.modeling.mixtures.routing import stops
from algorithms.modeling.source import ModelSource
from algorithms.numerics.low_rank.allocation import Option, allocate
from algorithms.numerics.low_rank.alternation import alternate
from algorithms.numerics.low_rank.factors import HALF, LowRank
from algorithms.numerics.low_rank.weight import LowRankWeight
from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import Ranks, share_out
from algorithms.quantization.reallm.config import AQLM, NERV, NF, VQ, ReallmConfig
from algorithms.quantization.reallm.shapes import DECODER_BITS, Shape, coder, place, write_shapes

logger = logging.getLogger(__name__)

KIND = "reallm-survey"
_KEY = "llm.ReALLM.target_bits"
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
_CLOSE = 0.01  # bits a weight within which a budget counts as met


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Of one matrix: bits and relative error of each code without a low-rank part; by rank, what multiplies that error."""

    codes: Mapping[tuple[int, int], tuple[int, float]]
    ranks: Mapping[int, float]
    shape: tuple[int, int]

    def options(self, factor_bits: int) -> dict[Shape, Option]:
        """What every shape costs."""
        ranks = sorted(self.ranks)
        found = {}
        for rank in range(ranks[-1] + 1):
            below = max(known for known in ranks if known <= rank)
            above = min(known for known in ranks if known >= rank)
            share = 0.0 if above == below else (rank - below) / (above - below)
            factor = self.ranks[below] ** (1 - share) * self.ranks[above] ** share
            size = LowRank.stored_size(self.shape, rank, factor_bits)
            for (code_bits, bucket), (bits, error) in self.codes.items():
                shape = Shape(rank=rank, code_bits=code_bits, bucket=bucket)
                found[shape] = Option(bits=bits + size, error=error * factor)
        return found


def shaping(config: ReallmConfig) -> Mapping[str, object]:
    """Every value that shapes what the survey chooses."""
    return {
        "target_bits": config.target_bits,
        "residual": config.residual,
        "low_rank_bits": config.low_rank_bits,
        "permute": config.permute,
        "seed": config.seed,
        **config.decoder_shaping,
    }


def look(context: StageContext, config: ReallmConfig) -> Artifact:
    """Measure all matrices and choose; leaves shapes.json. Ranks share out sequences and matrices; rank 0 chooses."""
    source, ranks, directory = context.source.with_attention(config.attn_implementation), context.ranks, context.output_dir
    (states,) = embed(
        source,
        [ranks.mine(context.tokens)],
        batch_size=max(1, TOKENS_PER_BATCH // config.sequence_length),
        device=context.device,
        offload=config.offload_activations,
        dtype=torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype),
    )
    curves: dict[str, Curves] = {}
    with context.progress("ReALLM survey", source.num_blocks) as advance:
        for index in range(source.num_blocks):
            block = source.load_block(index, device=context.device)
            hessians = _hessians(block, index, states, source.architecture, ranks)
            curves |= {place(index, name): found for name, found in _measured(block, index, hessians, config, ranks).items()}
            advance(f"block {index + 1}")
    digest = ""
    if ranks.is_main:
        write_shapes(directory, *choose(curves, source, config))
        digest = folder_digest(directory)
    ranks.meet()
    return Artifact(kind=KIND, directory=directory, digest=ranks.from_main(digest))


def choose(
    curves: Mapping[str, Curves], source: ModelSource, config: ReallmConfig
) -> tuple[dict[str, Shape], dict[str, object]]:
    """The shape of every matrix within the recipe's budget, and figures of the choice.

    Raises:
        StageError: the budget is out of reach.
    """
    assert config.target_bits is not None
    parameters = source.num_blocks * sum(rows * columns for rows, columns in linear_shapes(source).values())
    options = {name: found.options(config.low_rank_bits) for name, found in curves.items()}
    counted = [list(found.values()) for found in options.values()]
    least, most = (sum(limit(option.bits for option in found) for found in counted) / parameters for limit in (min, max))
    if not least <= config.target_bits <= most:
        raise StageError(f"{_KEY}: {config.target_bits:g} is out of reach; this model takes {least:.2f} to {most:.2f} bits.")
    places = allocate(counted, int(config.target_bits * parameters))
    shapes = {name: list(found)[chosen] for (name, found), chosen in zip(options.items(), places, strict=True)}
    bits = sum(options[name][shape].bits for name, shape in shapes.items()) / parameters
    if bits < config.target_bits - _CLOSE:
        logger.warning("%s: matrices are so few and small that %.3f bits of %g are used", _KEY, bits, config.target_bits)
    error = sum(options[name][shape].error for name, shape in shapes.items())
    return shapes, {"bits_per_weight": bits, "expected_error": error / len(shapes)}


def _hessians(
    block: nn.Module, index: int, states: Activations, architecture: ModelArchitecture, ranks: Ranks
) -> dict[str, Tensor]:
    """The Hessian of every linear's input; the hidden states pass the block."""
    found: dict[str, Tensor] = {}
    groups, routed = architecture.groups_in(block), False
    leaders = {group[0]: block.get_submodule(group[0]).weight.shape[1] for group in groups}
    with BlockWalk(block, index, states, stops(groups, architecture)) as walk:
        for group in groups:
            if architecture.experts is not None and architecture.is_expert(group[0]) and not routed:
                walk.route(architecture.experts, ranks)
                routed = True
            statistics = InputStatistics(leaders[group[0]], states.device)
            for batch in walk.next_stop():
                statistics.update(batch)
            ranks.meet()
            statistics.add_up(ranks.sum_)
            found |= dict.fromkeys(group, statistics.hessian())
        for number, output in enumerate(walk.outputs()):
            states.take(number, output)
    return found


def _measured(
    block: nn.Module, index: int, hessians: Mapping[str, Tensor], config: ReallmConfig, ranks: Ranks
) -> dict[str, Curves]:
    """The curves of all linears of a block, each measured by one rank."""
    weights = {name: block.get_submodule(name).weight.detach().float() for name in hessians}
    owners = share_out({name: weight.numel() for name, weight in weights.items()}, ranks.size)
    mine = {
        name: measure(weight, hessians[name], config, (index, name))
        for name, weight in weights.items()
        if owners[name] == ranks.rank
    }
    return {name: found for part in ranks.exchange(mine) for name, found in part.items()}


def measure(matrix: Tensor, hessian: Tensor, config: ReallmConfig, where: Sequence[object]) -> Curves:
    """Both curves of one matrix [O, I] under H [I, I]; ``where`` keys the randomness."""
    shape = (matrix.shape[0], matrix.shape[1])
    power = max(torch.sum((matrix @ hessian).double() * matrix).item(), torch.finfo(torch.float32).tiny)

    probe = _PROBE[config.residual]

    def _fit(code: tuple[int, int], rank: int) -> tuple[int, float]:
        generator = keyed_generator(config.seed, "reallm survey", *where)
        at = Shape(rank=rank, code_bits=code[0], bucket=code[1])
        found = alternate(
            matrix,
            hessian,
            coder(at, config, surveys=True),
            generator,
            rank=rank,
            factor_bits=config.low_rank_bits,
            iterations=1,
        )
        weight = LowRankWeight.of(
            replace(found, low_rank=LowRank.zero(shape, config.low_rank_bits, matrix.device)), config.residual
        )
        return sum(stored_bits(weight).values()), found.errors[-1] / power

    codes = {code: _fit(code, 0) for code in _CODES[config.residual] if code == probe or _pays(code, matrix, config)}
    start = codes[probe][1]
    ranks = {0: 1.0}
    for rank in (rank for rank in _RANKS if rank <= min(shape) // 2):
        share = _fit(probe, rank)[1] / start if start > 0 else 1.0
        ranks[rank] = min(share, ranks[max(ranks)]) if math.isfinite(share) else ranks[max(ranks)]
    return Curves(codes=codes, ranks=ranks, shape=shape)


def _pays(code: tuple[int, int], matrix: Tensor, config: ReallmConfig) -> bool:
    """Whether a codebook leaves enough of its bits to the codes to be worth measuring."""
    bits, bucket = code
    return config.residual == NF or HALF * bucket << min(bits, _WIDEST_BOOK) < _MOST_BOOK_BITS * matrix.numel()
