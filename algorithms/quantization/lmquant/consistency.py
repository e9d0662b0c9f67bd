"""How the keys of ``quant`` go together: what contradicts, what another key switches off, and what QServe can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from algorithms.quantization.lmquant.quant_config import SIGNED, Outputs, Quant, Weights
from algorithms.quantization.lmquant.settings import ROLES, ROW, Settings
from configs.strict import Parameters
from configs.tree import KeyPath

LEVELS = (
    "group_shapes, group_scale_dtypes, compute_dtype and compute_group_level that go together: [[1, N]], [torch.float16], null "
    "and -1; or [[1, -1], [1, N]], [torch.float16, sint8], sint8 and 0"
)
WHOLE_SCALES = "zintN where groups have scales of sint8: they come with zero points; sintN goes with one level of scales"
STATIC = "[[-1, -1]] with static: true, or [[1, N]] with static: false: a scale that is known beforehand belongs to no token"
DYNAMIC = "false: with static: false, ranges are found token by token, when the model runs"
NO_SEARCH = "strategy: Manual: a static range is the largest value in the text, times ratio"
NOTHING = "an exponent above 0 for strategy: Manual: with two of 0 nothing is smoothed (enable_xw and enable_yx say so)"
ALL_LINEARS = "false: formats hold all linears of a block alike; dtype: null leaves all of them as they are"
SQUARES = "2, the power of an error of outputs; others go with objective: TensorError, which compares weights"
TWO_RESTS = "one negative exponent at most for strategy: Manual: it stands for what the other one leaves of 1"


@dataclass(frozen=True)
class Contradiction:
    """Keys, below ``quant``, that do not go together, those that are wrong for the others first; and what was expected."""

    keys: tuple[KeyPath, ...]
    expected: str


def contradictions(quant: Quant) -> Iterator[Contradiction]:
    """What no single key shows to be wrong. Blocks that are switched off contradict nothing."""
    for name, linears in (("wgts", quant.wgts), ("ipts", quant.ipts)):
        if linears.dtype is not None:
            skipped = (f"skip_{role}" for role in ROLES if linears.__dict__[f"skip_{role}"])
            yield from (Contradiction(((name, key),), ALL_LINEARS) for key in skipped)
    if quant.wgts.dtype is not None:
        yield from _levels(quant.wgts)
        yield from _search(quant.wgts)
    if quant.opts.dtype is not None:
        yield from _cache(quant.opts)
    smooth = quant.smooth
    for name, enabled, block in (("xw", smooth.enable_xw, smooth.xw), ("yx", smooth.enable_yx, smooth.yx)):
        if quant.enable_smooth and enabled and block.strategy == "Manual":
            keys = tuple(("smooth", name, key) for key in ("beta", "alpha", "strategy"))
            if block.alpha < 0 and block.beta < 0:
                yield Contradiction(keys, TWO_RESTS)
            if block.alpha == block.beta == 0:
                yield Contradiction(keys, NOTHING)


def _levels(wgts: Weights) -> Iterator[Contradiction]:
    one, two = (("float16",), None, -1), (("float16", "sint8"), "sint8", 0)
    names = ("group_scale_dtypes", "compute_dtype", "compute_group_level")
    progressive = len(wgts.group_shapes) == 2
    given = (wgts.group_scale_dtypes, wgts.compute_dtype, wgts.compute_group_level)
    wrong = [name for name, value, right in zip(names, given, two if progressive else one, strict=True) if value != right]
    shapes = wgts.group_shapes
    if wrong or (progressive and (shapes[0][1] != ROW or shapes[1][1] == ROW)):
        yield Contradiction(tuple(("wgts", name) for name in (*wrong, "group_shapes")), LEVELS)
    elif progressive and wgts.dtype in SIGNED:
        yield Contradiction((("wgts", "dtype"), ("wgts", "group_shapes")), WHOLE_SCALES)


def _search(wgts: Weights) -> Iterator[Contradiction]:
    search = wgts.calib_range
    compares_outputs = search.strategy == "GridSearch" and search.objective != "TensorError"
    if wgts.enable_calib_range and compares_outputs and search.degree != 2:
        yield Contradiction(tuple(("wgts", "calib_range", key) for key in ("degree", "objective", "strategy")), SQUARES)


def _cache(opts: Outputs) -> Iterator[Contradiction]:
    (shape,) = opts.group_shapes
    if shape != (-1, -1) if opts.static else shape[0] != 1:
        yield Contradiction((("opts", "group_shapes"), ("opts", "static")), STATIC)
    elif opts.enable_calib_range and not opts.static:
        yield Contradiction((("opts", "enable_calib_range"), ("opts", "static")), DYNAMIC)
    elif opts.enable_calib_range and opts.calib_range.strategy != "Manual":
        yield Contradiction((("opts", "calib_range", "strategy"), ("opts", "enable_calib_range")), NO_SEARCH)


@dataclass(frozen=True)
class _Switch:
    """What has no effect, ``keys`` of ``block`` or all of it, where ``off`` holds, and why."""

    block: KeyPath
    off: Callable[[Quant], bool]
    reason: str
    keys: tuple[str, ...] = ()


_SEARCHED = ("objective", "granularity", "degree", "max_shrink", "max_expand", "num_grids")
_STATES = ("dtype",)  # says itself that its block is off
_SWITCHES = (
    _Switch(("wgts",), lambda quant: quant.wgts.dtype is None, "quant.wgts.dtype is null"),
    _Switch(("ipts",), lambda quant: quant.ipts.dtype is None, "quant.ipts.dtype is null"),
    _Switch(("opts",), lambda quant: quant.opts.dtype is None, "quant.opts.dtype is null"),
    _Switch(("rotation",), lambda quant: not quant.enable_rotation, "quant.enable_rotation is false"),
    _Switch(("reorder",), lambda quant: not quant.enable_reorder, "quant.enable_reorder is false"),
    _Switch(("smooth",), lambda quant: not quant.enable_smooth, "quant.enable_smooth is false"),
    _Switch(("smooth", "xw"), lambda quant: not quant.smooth.enable_xw, "quant.smooth.enable_xw is false"),
    _Switch(("smooth", "yx"), lambda quant: not quant.smooth.enable_yx, "quant.smooth.enable_yx is false"),
    _Switch(
        ("wgts", "calib_kernel", "gptq"),
        lambda quant: not (quant.wgts.enable_calib_kernel and quant.wgts.calib_kernel.enable_gptq),
        "it takes enable_calib_kernel: true and calib_kernel.enable_gptq: true",
    ),
    _Switch(
        ("wgts", "calib_range"), lambda quant: not quant.wgts.enable_calib_range, "quant.wgts.enable_calib_range is false"
    ),
    _Switch(
        ("wgts", "calib_range"), lambda _: True, "every group has the range that is best for it", ("granularity",)
    ),
    _Switch(("ipts", "calib_range"), lambda _: True, "ranges of inputs are found token by token, when the model runs"),
    _Switch(
        ("opts", "calib_range"), lambda quant: not quant.opts.enable_calib_range, "quant.opts.enable_calib_range is false"
    ),
    _Switch(("opts", "calib_range"), lambda _: True, "a static range is not searched for", _SEARCHED),
    _Switch(
        ("wgts", "calib_range"), lambda quant: quant.wgts.calib_range.strategy == "Manual", "strategy is Manual", _SEARCHED
    ),
    _Switch(
        ("wgts", "calib_range"), lambda quant: quant.wgts.calib_range.strategy != "Manual", "strategy is GridSearch", ("ratio",)
    ),
    *(
        _Switch(
            ("smooth", name), lambda quant, name=name: quant.smooth.__dict__[name].strategy == "Manual", "strategy is Manual",
            ("degree", "num_grids"),
        )
        for name in ("xw", "yx")
    ),
)  # fmt: skip


def switched_off(quant: Quant, given: Mapping[KeyPath, object], prefix: str) -> tuple[str, ...]:
    """One line for each block or key of which the recipe says something that another key leaves without effect.

    Args:
        quant: the blocks.
        given: what the recipe says itself, by path below ``quant``.
        prefix: the dotted path of ``quant``'s own block.
    """
    lines: list[str] = []
    said = [path for path in given if _means_something(quant, path)]
    for switch in _SWITCHES:
        if not switch.off(quant):
            continue
        depth = len(switch.block)
        below = [path for path in said if path[:depth] == switch.block and len(path) > depth]
        concerned = [path for path in below if (path[depth] in switch.keys if switch.keys else path[depth] not in _STATES)]
        said = [path for path in said if path not in concerned]
        names = concerned if switch.keys else [switch.block] if concerned else []
        lines += [f"{prefix}quant.{'.'.join(map(str, name))} has no effect: {switch.reason}" for name in names]
    return tuple(lines)


def _means_something(quant: Quant, path: KeyPath) -> bool:
    """Whether a key is one that counts somewhere, with another value than it has anyway."""
    block: object = quant
    usual: object = type(quant)()
    for part in path[:-1]:
        assert isinstance(block, Parameters)
        assert isinstance(usual, Parameters)
        block, usual = block.__dict__[part], usual.__dict__[part]
    assert isinstance(block, Parameters)
    assert isinstance(usual, Parameters)
    name = str(path[-1])
    return name not in block.inert and block.__dict__[name] != usual.__dict__[name]


def qserve_obstacle(settings: Settings) -> str | None:
    """Why QServe cannot run what these settings make, in any model; None where it can."""
    weights, inputs, cache, smooth = settings.weights, settings.inputs, settings.cache, settings.smooth_xw
    if weights is None:
        return "it has kernels for quantized weights (quant.wgts.dtype: zint4)"
    if inputs is None or inputs.bits != 8:
        return "it multiplies weights by inputs of 8 bits (quant.ipts.dtype: sint8)"
    groups = weights.progressive and weights.bits == 4 and weights.group_size == 128
    rows = weights.group_size == ROW and (weights.bits == 4 or (weights.bits == 8 and weights.symmetric))
    if not groups and not rows:
        return "its weights have 4 bits in rows or in groups of 128 with scales of sint8, or 8 bits, symmetric, in rows"
    if cache is not None and cache.bits not in (4, 8):
        return f"its caches have 4 or 8 bits, or 16 where quant.opts.dtype is null, and not {cache.bits}"
    if settings.rotation is None:
        return "it takes all norms for ones, which quant.enable_rotation: true makes them"
    if smooth is not None and not {"proj_qkv", "proj_1st"} <= set(smooth.skips):
        return "it takes all norms for ones: set quant.smooth.xw.skip_proj_qkv and skip_proj_1st to true"
    return None
