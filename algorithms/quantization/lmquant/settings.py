"""What the blocks of ``llm.LMQuant.quant`` come to: one typed value for each thing that is done, None where it is not.

Linears are named by the role that LMQuant gives them: proj_qkv (queries, keys, values), proj_out (o), proj_1st (gate, up) and
proj_2nd (down).
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from algorithms.modeling.architecture import ModelArchitecture
from algorithms.quantization.lmquant import quant_config
from algorithms.quantization.lmquant.quant_config import Quant

ROLES = ("proj_qkv", "proj_out", "proj_1st", "proj_2nd")
ROW = -1


@dataclass(frozen=True, kw_only=True)
class WeightSetting:
    """``group_size`` counts columns, -1 for a whole row.

    ``progressive``: the groups stand on rows of 8-bit codes, so that a group's scale and zero are whole numbers.
    """

    bits: int
    symmetric: bool
    group_size: int
    progressive: bool


@dataclass(frozen=True, kw_only=True)
class ActivationSetting:
    """Inputs of linears: symmetric, one scale for each token."""

    bits: int


@dataclass(frozen=True, kw_only=True)
class CacheSetting:
    """Outputs of attention's linears, keys behind their rotary embedding.

    A dynamic scale belongs to a token and ``group_size`` channels of a head (to all of a head where it has fewer), or, for -1,
    to all heads. A ``static`` one belongs to the whole tensor: ``ratio`` times the largest value in the text.
    """

    bits: int
    symmetric: bool
    group_size: int
    static: bool = False
    ratio: float = 1.0
    skip_q: bool = False
    skip_k: bool = False
    skip_v: bool = False


@dataclass(frozen=True, kw_only=True)
class RangeSearch:
    """Which shares of the largest value a weight grid may reach, group by group. A fixed one is a search of ``num_grids`` 0."""

    objective: str
    degree: float
    num_grids: int
    max_shrink: float
    max_expand: float
    ratio: float = 1.0
    skips: tuple[str, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Every candidate: ``ratio``, those down to ``max_shrink``, those up to ``max_expand``."""
        steps = [step / self.num_grids for step in range(1, self.num_grids + 1)]
        shrunk = (1 - share * (1 - self.max_shrink) for share in steps)
        expanded = (1 + share * (self.max_expand - 1) for share in steps if self.max_expand > 1)
        return (self.ratio, *shrunk, *expanded)


@dataclass(frozen=True, kw_only=True)
class GptqKernel:
    """``damping`` is a share of the Hessian's mean diagonal; ``skips`` are rounded to nearest."""

    damping: float
    skips: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """A Hadamard matrix on the residual stream; ``random`` draws signs for it."""

    random: bool


@dataclass(frozen=True, kw_only=True)
class Reorder:
    """``index``: Sequential sorts channels by their ``metric``; Transpose deals them out to the groups in turn.

    ``strategy``: Manual takes that order, GridSearch compares it with others.
    """

    metric: str
    index: str
    strategy: str
    skips: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Factors a^alpha / b^beta for each channel, from the largest values a and b of its two sides.

    Fixed exponents are a search of ``num_grids`` 0.
    """

    alpha: float
    beta: float
    num_grids: int
    degree: float
    ranges: tuple[tuple[str, str], ...]
    skips: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[tuple[float, float], ...]:
        """The pairs (alpha, beta) to compare; one pair where there is nothing to compare."""
        return candidates(self.alpha, self.beta, self.num_grids)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of them. ``range_search`` and ``gptq`` are about the weights."""

    weights: WeightSetting | None
    inputs: ActivationSetting | None
    cache: CacheSetting | None
    range_search: RangeSearch | None
    gptq: GptqKernel | None
    rotation: Rotation | None
    reorder: Reorder | None
    smooth_xw: Smoothing | None
    smooth_yx: Smoothing | None


def role_of(architecture: ModelArchitecture, name: str) -> str:
    """The role of a linear, by its path in a block."""
    leader = next(group[0] for group in architecture.input_groups if name in group)
    queries, _, values = architecture.qkv
    if leader == queries:
        return "proj_qkv"
    if architecture.feeders.get(leader) == values:
        return "proj_out"
    return "proj_1st" if leader in architecture.input_norms else "proj_2nd"


def candidates(alpha: float, beta: float, num_grids: int) -> tuple[tuple[float, float], ...]:
    """The pairs of exponents that ``alpha`` and ``beta`` of a smoothing stand for.

    Args:
        alpha: 0 to 1, or -1, -2 or -3, which name sets of pairs.
        beta: the same.
        num_grids: n, for exponents c of 1/n, ..., (n-1)/n; 0 for the pair (alpha, beta) itself, in which a negative number
            stands for what the other one leaves of 1.

    Returns:
        With a grid: (0, 0), which smooths nothing, and then, with one positive exponent as good as another,

        - (c, c) where both are positive,
        - (c, 0) where beta is 0, -2 or -3, and (0, c) where alpha is,
        - (c, 1 - c) where one is -1 or -2 and none -3,
        - (c, c') for all c and c' where one is -3; with alpha -3 and beta -1 (c, 0) as well.
    """
    if num_grids == 0:
        return ((alpha, 1 - alpha) if beta < 0 else (1 - beta, beta) if alpha < 0 else (alpha, beta),)
    grid = [step / num_grids for step in range(1, num_grids)]
    found = [(0.0, 0.0)]
    if beta in (0, -2, -3) or (alpha, beta) == (-3, -1):
        found += [(c, 0.0) for c in grid]
    if alpha in (0, -2, -3):
        found += [(0.0, c) for c in grid]
    if -3 in (alpha, beta):
        found += [(c, other) for c in grid for other in grid]
    elif {alpha, beta} & {-1, -2}:
        found += [(c, 1 - c) for c in grid]
    elif alpha > 0 and beta > 0:
        found += [(c, c) for c in grid]
    return tuple(found)


def resolve(quant: Quant) -> Settings:
    """The settings of ``quant``, whose keys do not contradict each other."""
    smooth = quant.smooth
    keys_and_queries = quant.enable_smooth and smooth.enable_yx and not smooth.yx.skip_attn_qk
    return Settings(
        weights=_weights(quant.wgts),
        inputs=None if quant.ipts.dtype is None else ActivationSetting(bits=_bits(quant.ipts.dtype)),
        cache=_cache(quant.opts),
        range_search=_range_search(quant.wgts),
        gptq=_gptq(quant.wgts),
        rotation=Rotation(random=quant.rotation.random) if quant.enable_rotation else None,
        reorder=_reorder(quant.reorder) if quant.enable_reorder else None,
        smooth_xw=_smoothing(smooth.xw, _skips(smooth.xw)) if quant.enable_smooth and smooth.enable_xw else None,
        smooth_yx=_smoothing(smooth.yx, ()) if keys_and_queries else None,
    )


def _reorder(block: quant_config.Reorder) -> Reorder:
    return Reorder(metric=block.channel_metric, index=block.channel_index, strategy=block.strategy, skips=_skips(block))


def _bits(dtype: str) -> int:
    return int(dtype[-1])


def _skips(block: BaseModel, prefix: str = "skip_", left_out: bool = True) -> tuple[str, ...]:
    values = dict(block)
    return tuple(role for role in ROLES if values.get(f"{prefix}{role}") is left_out)


def _weights(wgts: quant_config.Weights) -> WeightSetting | None:
    if wgts.dtype is None:
        return None
    return WeightSetting(
        bits=_bits(wgts.dtype),
        symmetric=wgts.dtype in quant_config.SIGNED,
        group_size=wgts.group_shapes[-1][1],
        progressive=len(wgts.group_shapes) == 2,
    )


def _cache(opts: quant_config.Outputs) -> CacheSetting | None:
    if opts.dtype is None or (opts.skip_attn_q and opts.skip_attn_k and opts.skip_attn_v):
        return None
    return CacheSetting(
        bits=_bits(opts.dtype),
        symmetric=opts.dtype in quant_config.SIGNED,
        group_size=opts.group_shapes[0][1],
        static=opts.static,
        ratio=opts.calib_range.ratio if opts.enable_calib_range else 1.0,
        skip_q=opts.skip_attn_q,
        skip_k=opts.skip_attn_k,
        skip_v=opts.skip_attn_v,
    )


def _range_search(wgts: quant_config.Weights) -> RangeSearch | None:
    search = wgts.calib_range
    if wgts.dtype is None or not wgts.enable_calib_range or (search.strategy == "Manual" and search.ratio == 1.0):
        return None
    if search.strategy == "Manual":  # the other keys have no effect, so recipes that differ in them are the same
        return RangeSearch(
            objective="TensorError", degree=2.0, num_grids=0, max_shrink=1.0, max_expand=1.0, ratio=search.ratio,
            skips=_skips(search),
        )  # fmt: skip
    return RangeSearch(
        objective=search.objective,
        degree=search.degree,
        num_grids=search.num_grids,
        max_shrink=search.max_shrink,
        max_expand=search.max_expand,
        skips=_skips(search),
    )


def _gptq(wgts: quant_config.Weights) -> GptqKernel | None:
    kernel = wgts.calib_kernel
    if wgts.dtype is None or not (wgts.enable_calib_kernel and kernel.enable_gptq):
        return None
    return GptqKernel(damping=kernel.gptq.damp_percentage, skips=_skips(kernel.gptq, "include_", left_out=False))


def _smoothing(block: quant_config.InputSmoothing | quant_config.AttentionSmoothing, skips: tuple[str, ...]) -> Smoothing:
    alpha, beta = block.alpha, block.beta
    if block.strategy == "Manual":
        ((alpha, beta),) = candidates(alpha, beta, 0)
        return Smoothing(alpha=alpha, beta=beta, num_grids=0, degree=2.0, ranges=block.ranges, skips=skips)
    return Smoothing(  # all positive exponents stand for the same candidates
        alpha=alpha if alpha <= 0 else 0.5,
        beta=beta if beta <= 0 else 0.5,
        num_grids=block.num_grids,
        degree=block.degree,
        ranges=block.ranges,
        skips=skips,
    )
