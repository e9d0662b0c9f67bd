"""The blocks of ``llm.LMQuant.quant``, under LMQuant's own names; ``settings`` in this folder says what they come to.

Without a preset everything is off, as in LMQuant's ``llm.yaml``: no weight, input or output has a ``dtype``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from configs.strict import Inert, Parameters
from configs.values import Choice, Count, Flag, Nullable, Only, Positive, Real, Text, Whole, expected

SIGNED = tuple(f"sint{bits}" for bits in range(2, 9))  # symmetric; sint16 and the like are no compression
INTEGERS = (*(f"zint{bits}" for bits in range(2, 9)), *SIGNED)  # zint: with a zero point
OBJECTIVES = ("TensorError", "ProductsError", "OutputsError")
STRATEGIES = ("Manual", "GridSearch")
ABS_MAX = (("AbsMax", "AbsMax"),)

OUTPUT_LAYER = "false: the output layer stays as it is"
NO_NESTED_SEARCH = "false: candidates are compared as rounding to nearest leaves them"
LAYER_OUTPUTS = "OutputsError: factors are compared by what a layer puts out"
WHOLE_LAYER = "Layer: the factors of a layer are chosen together"
ONE_SETTING = "false: all of a kind have one setting, apart from those that are skipped"
AT_RUN_TIME = "ranges of inputs are found token by token, when the model runs"
KEPT = "true: embeddings, routers and the output layer stay as they are"
NO_HADAMARD = "false: the model would need a Hadamard transform while it runs, and no server of these formats has one"
ROUTERS = Inert(False, "routers stay as they are anyway")
PIECES = Inert(-1, "it only cuts the work into pieces")
SAMPLES = Inert(-1, "nsamples alone says how much text is looked at")

Pieces = Annotated[int, BeforeValidator(Whole(-1))]
No = Annotated[bool, BeforeValidator(Only(False, NO_NESTED_SEARCH))]
Skipped = Annotated[bool, BeforeValidator(Only(True, KEPT))]
NoHadamard = Annotated[bool, BeforeValidator(Only(False, NO_HADAMARD))]
NoSelection = Annotated[bool, BeforeValidator(Only(False, ONE_SETTING))]
Strategy = Annotated[str, BeforeValidator(Choice(STRATEGIES))]
NoComputeType = Annotated[None, BeforeValidator(Only(None, "null: scales have one level"))]
NotShared = Annotated[int, BeforeValidator(Only(1, "1: no two tokens share a scale"))]


@dataclass(frozen=True)
class _Shapes:
    """Reads [[1, 128]]: rows and columns of a group, -1 for all of them, for each level of scales; ``what`` describes them."""

    what: str
    levels: int = 1
    rows: tuple[int, ...] = (1,)
    whole_rows: bool = False

    def __call__(self, value: object) -> tuple[tuple[int, int], ...]:
        """The shapes, or the error that says which there are."""
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= self.levels:
            raise expected(self.what)
        if not all(isinstance(shape, list | tuple) and len(shape) == 2 for shape in value):
            raise expected(self.what)
        shapes = tuple((Whole(-1)(rows), Whole(-1)(columns)) for rows, columns in value)
        for rows, columns in shapes:
            if rows not in self.rows or columns == 0 or (self.whole_rows and columns != -1):
                raise expected(self.what)
        return shapes


@dataclass(frozen=True)
class _ScaleDtypes:
    """Reads [torch.float16] or, for two levels, [torch.float16, sint8]; null is float16."""

    levels: int = 1

    def __call__(self, value: object) -> tuple[str, ...]:
        """The types without torch, or the error that says which there are."""
        stored = ("float16", "sint8")[: self.levels]  # what the formats have
        names = [entry.removeprefix("torch.") if isinstance(entry, str) else entry for entry in _entries(value)]
        found = tuple("float16" if name is None else name for name in names)
        if found not in (stored[:1], stored):
            raise expected("[torch.float16]" + (", or [torch.float16, sint8] for two levels" if self.levels > 1 else ""))
        return found


def _entries(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else ()


def _exponent(value: object) -> float:
    number = Real()(value)
    if not (0 <= number <= 1 or number in (-1, -2, -3)):
        raise expected("a number from 0 to 1; or -1, -2 or -3, which name sets of candidates")
    return number


def _statistics(value: object) -> tuple[tuple[str, str], ...]:
    if value not in (ABS_MAX, [list(pair) for pair in ABS_MAX]):
        raise expected("[[AbsMax, AbsMax]]: factors come from the largest input and the largest weight of a channel")
    return ABS_MAX


WEIGHT_SHAPES = _Shapes("[[1, N]] for groups of N columns, [[1, -1]] for rows, [[1, -1], [1, N]] for groups in rows", levels=2)
TOKEN_SHAPES = _Shapes("[[1, -1]]: inputs have one scale for each token", whole_rows=True)
CACHE_SHAPES = _Shapes("[[1, N]] for N channels of a head, [[1, -1]] for a token, or [[-1, -1]] for the tensor", rows=(1, -1))
Shapes = tuple[tuple[int, int], ...]
HalfScales = Annotated[tuple[str, ...], BeforeValidator(_ScaleDtypes(), json_schema_input_type=list[str | None])]
TwoLevelScales = Annotated[tuple[str, ...], BeforeValidator(_ScaleDtypes(levels=2), json_schema_input_type=list[str | None])]
Exponent = Annotated[float, BeforeValidator(_exponent)]
Statistics = Annotated[tuple[tuple[str, str], ...], BeforeValidator(_statistics)]
OptionalInteger = Annotated[str | None, BeforeValidator(Nullable(Choice(INTEGERS)))]
ROW: tuple[tuple[int, int], ...] = ((1, -1),)
HALF: tuple[str, ...] = ("float16",)


class Linears(Parameters):
    """Which linears are left out: those of queries, keys and values; of attention's output; gate and up; down."""

    skip_proj_qkv: Flag = False
    skip_proj_out: Flag = False
    skip_proj_1st: Flag = False
    skip_proj_2nd: Flag = False


class Search(Parameters):
    """How candidates are compared; most of these keys only said how much memory that may take."""

    strategy: Strategy = "GridSearch"
    degree: Positive = 2.0
    element_batch_size: Pieces = -1
    sample_batch_size: Pieces = -1
    element_size: Pieces = -1
    sample_size: Pieces = -1
    pre_reshape: Flag = True
    outputs_device: Text = "cpu"
    allow_kernel_calib: No = False

    inert: ClassVar[Mapping[str, Inert]] = {
        "element_batch_size": PIECES,
        "sample_batch_size": PIECES,
        "element_size": SAMPLES,
        "sample_size": SAMPLES,
        "pre_reshape": Inert(True, "it only changes how the work is laid out"),
        "outputs_device": Inert("cpu", "offload_activations says where tensors wait"),
    }


class RangeSearch(Search):
    """``calib_range``: how much of the largest value a grid reaches. Manual takes ``ratio``."""

    objective: Annotated[str, BeforeValidator(Choice(OBJECTIVES))] = "OutputsError"
    granularity: Annotated[str, BeforeValidator(Choice(("Layer", "ChannelGroup", "Group")))] = "ChannelGroup"
    ratio: Positive = 1.0
    max_shrink: Annotated[float, BeforeValidator(Real(above=0.0, below=1.0))] = 0.2
    max_expand: Annotated[float, BeforeValidator(Real(least=1.0))] = 1.0
    num_grids: Count = 80


class InputRangeSearch(RangeSearch, Linears):
    """``ipts.calib_range``."""

    skip_router: Flag = False

    inert: ClassVar[Mapping[str, Inert]] = {**Search.inert, "skip_router": ROUTERS}


class WeightRangeSearch(RangeSearch, Linears):
    """``wgts.calib_range``."""

    skip_router: Flag = False
    strategy: Strategy = "Manual"
    granularity: Annotated[str, BeforeValidator(Choice(("Layer", "ChannelGroup", "Group")))] = "Group"

    inert: ClassVar[Mapping[str, Inert]] = {**Search.inert, "skip_router": ROUTERS}


class OutputRangeSearch(RangeSearch):
    """``opts.calib_range``."""

    skip_attn_q: Flag = False
    skip_attn_k: Flag = False
    skip_attn_v: Flag = False

    inert: ClassVar[Mapping[str, Inert]] = {
        **Search.inert,
        **{f"skip_attn_{name}": Inert(False, f"opts.skip_attn_{name} counts, without calib_range") for name in "qkv"},
    }


class Gptq(Parameters):
    """``calib_kernel.gptq``."""

    damp_percentage: Annotated[float, BeforeValidator(Real(least=0.0))] = 0.01
    block_size: Count = 128
    num_inv_tries: Count = 250
    hessian_block_size: Annotated[int, BeforeValidator(Whole(-1))] = 512
    include_proj_qkv: Flag = True
    include_proj_out: Flag = True
    include_proj_1st: Flag = True
    include_proj_2nd: Flag = True

    inert: ClassVar[Mapping[str, Inert]] = {
        "block_size": Inert(128, "it only cuts the work into pieces"),
        "num_inv_tries": Inert(250, "damping grows until the factor exists"),
        "hessian_block_size": Inert(512, "it only cuts the work into pieces"),
    }


class Kernel(Parameters):
    """``wgts.calib_kernel``."""

    enable_gptq: Flag = False
    gptq: Gptq = Field(default_factory=Gptq)


class Weights(Linears):
    """``wgts``: the linears of the blocks. ``dtype: null`` leaves them in float16."""

    static: Flag = True
    dtype: OptionalInteger = None
    group_shapes: Annotated[Shapes, BeforeValidator(WEIGHT_SHAPES)] = ROW
    group_scale_dtypes: TwoLevelScales = HALF
    compute_dtype: Annotated[str | None, BeforeValidator(Nullable(Choice(("sint8",))))] = None
    compute_group_level: Annotated[int, BeforeValidator(Whole(-1, 0))] = -1
    saturate_compute_dtype: Annotated[
        bool, BeforeValidator(Only(False, "false: the range of the first level leaves nothing to saturate"))
    ] = False
    enable_calib_kernel: Flag = False
    calib_kernel: Kernel = Field(default_factory=Kernel)
    enable_calib_range: Flag = True
    calib_range: WeightRangeSearch = Field(default_factory=WeightRangeSearch)
    skip_head: Skipped = True
    skip_embed: Skipped = True
    skip_router: Skipped = True

    inert: ClassVar[Mapping[str, Inert]] = {"static": Inert(True, "weights do not change")}


class Inputs(Linears):
    """``ipts``: what the linears read, one scale for each token, found when the model runs."""

    static: Annotated[bool, BeforeValidator(Only(False, f"false: {AT_RUN_TIME}"))] = False
    dtype: Annotated[str | None, BeforeValidator(Nullable(Choice(SIGNED)))] = None
    group_shapes: Annotated[Shapes, BeforeValidator(TOKEN_SHAPES)] = ROW
    group_scale_dtypes: HalfScales = HALF
    compute_dtype: NoComputeType = None
    share_size: NotShared = 1
    share_part: Text = "m"
    enable_calib_range: Annotated[bool, BeforeValidator(Only(False, f"false: {AT_RUN_TIME}"))] = False
    calib_range: InputRangeSearch = Field(default_factory=InputRangeSearch)
    skip_head: Skipped = True
    skip_embed: Skipped = True
    skip_router: Skipped = True

    inert: ClassVar[Mapping[str, Inert]] = {"share_part": Inert("m", "no two tokens share a scale")}


class Outputs(Parameters):
    """``opts``: what attention keeps, so keys and values are the cache. Dynamic ones have scales for each token."""

    static: Flag = False
    dtype: OptionalInteger = None
    group_shapes: Annotated[Shapes, BeforeValidator(CACHE_SHAPES)] = ROW
    group_scale_dtypes: HalfScales = HALF
    compute_dtype: NoComputeType = None
    share_size: NotShared = 1
    share_part: Text = "m"
    enable_calib_range: Flag = False
    calib_range: OutputRangeSearch = Field(default_factory=OutputRangeSearch)
    skip_attn_q: Flag = False
    skip_attn_k: Flag = False
    skip_attn_v: Flag = False

    inert: ClassVar[Mapping[str, Inert]] = Inputs.inert


class Rotation(Parameters):
    """``rotation``: of the residual stream, folded into the weights."""

    random: Flag = False
    transform_proj_out: NoHadamard = False
    transform_proj_2nd: NoHadamard = False


class Reorder(Search):
    """``reorder``: input channels of o and down, in the order of a statistic."""

    channel_metric: Annotated[
        str, BeforeValidator(Only("InputsAbsMax", "InputsAbsMax: channels are ordered by their largest input"))
    ] = "InputsAbsMax"
    channel_index: Annotated[str, BeforeValidator(Choice(("Sequential", "Transpose")))] = "Transpose"
    dynamic: Annotated[bool, BeforeValidator(Only(False, "false: an order is fixed when weights are written"))] = False
    skip_residual: Annotated[bool, BeforeValidator(Only(True, "true: the residual stream keeps its order"))] = True
    skip_proj_out: Flag = False
    skip_proj_2nd: Flag = False
    skip_proj_out: Flag = False
    skip_proj_2nd: Flag = False


class AttentionSmoothing(Search):
    """``smooth.yx``: between keys (alpha) and queries (beta)."""

    objective: Annotated[str, BeforeValidator(Only("OutputsError", LAYER_OUTPUTS))] = "OutputsError"
    granularity: Annotated[str, BeforeValidator(Only("Layer", WHOLE_LAYER))] = "Layer"
    ranges: Statistics = ABS_MAX
    alpha: Exponent = -3.0
    beta: Exponent = -3.0
    num_grids: Annotated[int, BeforeValidator(Whole(2))] = 20
    skip_attn_qk: Flag = False


class InputSmoothing(Search, Linears):
    """``smooth.xw``: between a linear's inputs (alpha) and its weights (beta)."""

    objective: Annotated[str, BeforeValidator(Only("OutputsError", LAYER_OUTPUTS))] = "OutputsError"
    granularity: Annotated[str, BeforeValidator(Only("Layer", WHOLE_LAYER))] = "Layer"
    ranges: Statistics = ABS_MAX
    alpha: Exponent = -3.0
    beta: Exponent = -3.0
    num_grids: Annotated[int, BeforeValidator(Whole(2))] = 20


class Smooth(Parameters):
    """``smooth``."""

    enable_xw: Flag = False
    xw: InputSmoothing = Field(default_factory=InputSmoothing)
    enable_yx: Flag = False
    yx: AttentionSmoothing = Field(default_factory=AttentionSmoothing)


class Quant(Parameters):
    """``quant``."""

    post_rotary: Annotated[
        bool, BeforeValidator(Only(True, "true: caches hold keys behind their rotary embedding, so those are quantized"))
    ] = True
    develop_dtype: Annotated[str, BeforeValidator(Choice(("float32", "float64", "float16", "bfloat16"), prefix="torch."))] = (
        "float32"
    )
    wgts: Weights = Field(default_factory=Weights)
    ipts: Inputs = Field(default_factory=Inputs)
    opts: Outputs = Field(default_factory=Outputs)
    enable_rotation: Flag = False
    rotation: Rotation = Field(default_factory=Rotation)
    enable_reorder: Flag = False
    reorder: Reorder = Field(default_factory=Reorder)
    enable_smooth: Flag = False
    smooth: Smooth = Field(default_factory=Smooth)
    enable_select_wgts: NoSelection = False
    enable_select_ipts: NoSelection = False
    enable_select_opts: NoSelection = False
    bias_correction: Flag = False
    lm_head: Annotated[bool, BeforeValidator(Only(False, OUTPUT_LAYER))] = False

    inert: ClassVar[Mapping[str, Inert]] = {
        "develop_dtype": Inert("float32", "rotations and factors are computed in at least float32 whatever it says"),
        "bias_correction": Inert(False, "LMQuant itself has no such key"),
    }
