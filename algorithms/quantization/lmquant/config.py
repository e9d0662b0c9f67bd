"""The parameters of LMQuant as recipes spell them (``llm.LMQuant``): a preset, and every key of LMQuant's own files.

Keys may be blocks inside each other or have dots, ``quant.smooth.xw.alpha``. ``quant`` is in this folder's ``quant_config``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, PrivateAttr, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from algorithms.blockwise.config import BlockwiseParameters
from algorithms.quantization.lmquant.consistency import contradictions, qserve_obstacle, switched_off
from algorithms.quantization.lmquant.presets import ALIASES, NAMES, NOTHING, leaves, over, preset
from algorithms.quantization.lmquant.quant_config import Quant
from algorithms.quantization.lmquant.settings import Settings, resolve
from configs.errors import shown
from configs.strict import Inert, Parameters
from configs.tree import KeyPath, unfold
from configs.values import Choice, Flag, NumberOrZero, OptionalText, Whole, expected, flag, names

MEASURED = Inert(None, "EVALUATION at the top of the recipe says what is measured")
PLACES = Inert(None, "JOB_SERVICE, JOB_ID and CACHE_PATH at the top of the recipe name the folders")
MODEL = Inert(None, "MODEL at the top of the recipe names the model")
DATA = Inert(None, "DATASET_NAME or DATA_PATH at the top of the recipe names the text")
WINDOWS = Inert(0, "texts are joined and cut into sequences of model_seqlen tokens, whatever their own length")
DEVICES = Inert(None, "CUDA_ID at the top of the recipe names the devices")
TASK = re.compile(r"[^:\s]+(:[0-9]+)?")

# What the keys of ``shaping`` are called, so that a plan can name those that have changed.
_SETTING_KEYS = {
    "weights": "quant.wgts",
    "inputs": "quant.ipts",
    "cache": "quant.opts",
    "range_search": "quant.wgts.calib_range",
    "gptq": "quant.wgts.calib_kernel.gptq",
    "rotation": "quant.rotation",
    "reorder": "quant.reorder",
    "smooth_xw": "quant.smooth.xw",
    "smooth_yx": "quant.smooth.yx",
}
_NOT_SETTINGS = ("quant_type", "quant", "calib", "evaluation", "model", "keep_scales", "loads_with_qserve")


@dataclasses.dataclass(frozen=True)
class _Twin:
    """LMQuant's spelling of a key that every method has: its path, the key with its Python name, and how both are read."""

    path: KeyPath
    key: str
    name: str
    read: Callable[[object], object]


_TWINS = (
    _Twin(("calib", "num_samples"), "nsamples", "num_samples", Whole(1)),
    _Twin(("calib", "seq_length"), "model_seqlen", "sequence_length", Whole(2)),
    _Twin(("keep_scales",), "save_intermediate_results", "save_intermediate_results", flag),
)


def _quant_type(value: object) -> str:
    name = Choice(NAMES)(value)
    return ALIASES.get(name, name)


def _tasks(value: object) -> tuple[str, ...]:
    """Reads a list of tasks, each alone or with its number of examples."""
    found = names(value)
    for task in found:
        if not TASK.fullmatch(task):
            raise expected(f"names of tasks such as wikitext or arc_challenge:25 (not {task})")
    return found


Tasks = Annotated[tuple[str, ...] | None, BeforeValidator(_tasks, json_schema_input_type=str | list[str] | None)]


class Calib(Parameters):
    """``calib``: nsamples and model_seqlen under LMQuant's names, and what other keys of the recipe say."""

    num_samples: Annotated[int | None, BeforeValidator(Whole(1))] = None
    seq_length: Annotated[int | None, BeforeValidator(Whole(2))] = None
    min_seq_length: NumberOrZero = 0
    max_seq_length: NumberOrZero = 0
    data: OptionalText = None
    dataset_path: OptionalText = None
    local_dataset_path: OptionalText = None
    cache_root: OptionalText = None

    inert: ClassVar[Mapping[str, Inert]] = {
        "min_seq_length": WINDOWS,
        "max_seq_length": WINDOWS,
        "data": DATA,
        "dataset_path": DATA,
        "local_dataset_path": DATA,
        "cache_root": PLACES,
    }


class Eval(Parameters):
    """``eval``."""

    tasks: Tasks = None
    max_seq_length: Annotated[int | None, BeforeValidator(Whole(-(2**31)))] = None
    evaluator: Annotated[str | None, BeforeValidator(Choice(("gptq", "lm_eval")))] = None
    num_gpus: Annotated[int | None, BeforeValidator(Whole(1))] = None
    batch_size: Annotated[int | None, BeforeValidator(Whole(1))] = None
    output_root: OptionalText = None
    output_dirname: OptionalText = None
    cache_root: OptionalText = None
    attach_timestamp: Flag = False

    inert: ClassVar[Mapping[str, Inert]] = {
        "tasks": MEASURED,
        "max_seq_length": MEASURED,
        "evaluator": MEASURED,
        "num_gpus": DEVICES,
        "batch_size": MEASURED,
        "output_root": PLACES,
        "output_dirname": PLACES,
        "cache_root": PLACES,
        "attach_timestamp": Inert(False, PLACES.reason),
    }


class Model(Parameters):
    """``model``."""

    name: OptionalText = None
    root: OptionalText = None
    local_root: OptionalText = None
    local_path: OptionalText = None

    inert: ClassVar[Mapping[str, Inert]] = {"name": MODEL, "root": MODEL, "local_root": MODEL, "local_path": MODEL}


class LmquantConfig(BlockwiseParameters):
    """The block ``llm.LMQuant``. Further keys: :class:`algorithms.blockwise.config.BlockwiseParameters`.

    What is not in the recipe is as ``quant_type`` has it. ``settings`` is what algorithms read.
    """

    algorithm: ClassVar[str] = "LMQuant"
    export_formats: ClassVar[tuple[str, ...]] = (
        "qserve", "compressed-tensors", "awq", "gptq", "auto-round", "gguf", "dense",
    )  # fmt: skip

    quant_type: Annotated[str, BeforeValidator(_quant_type)] = NOTHING
    quant: Quant = Field(default_factory=Quant)
    calib: Calib = Field(default_factory=Calib)
    evaluation: Eval = Field(default_factory=Eval, alias="eval")
    model: Model = Field(default_factory=Model)
    keep_scales: Annotated[bool | None, BeforeValidator(flag)] = None  # save_intermediate_results under LMQuant's name
    loads_with_qserve: Flag = False
    save_model: Flag = True

    inert: ClassVar[Mapping[str, Inert]] = {
        "loads_with_qserve": Inert(True, "EXPORT names the formats; without it, qserve is written"),
        "save_model": Inert(True, "the compressed model is always saved"),
    }

    _given: Mapping[KeyPath, object] = PrivateAttr(default_factory=dict)  # what the recipe says itself, presets apart

    @model_validator(mode="wrap")
    @classmethod
    def _over_a_preset(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, Mapping):
            return handler(values)
        own, clashes = unfold(values)
        given = dict(leaves(own))
        errors = [_error(path, given.get(path), "one value: with dots and in blocks it has two") for path, _ in clashes]
        config = handler(_completed(own, given))
        config._given = given
        errors += [*_torn_twins(own, given), *config._contradictions()]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return config

    def _contradictions(self) -> Iterator[InitErrorDetails]:
        """Keys that do not go together, each reported at one that the recipe itself has."""
        found = list(contradictions(self.quant))
        for one in found:
            paths = [("quant", *path) for path in one.keys]
            path = next((path for path in paths if path in self._given), ("quant_type",))
            yield _error(path, self._given.get(path, self.quant_type), one.expected)
        obstacle = None if found or not self.loads_with_qserve else qserve_obstacle(self.settings)
        if obstacle is not None:
            yield _error(("loads_with_qserve",), True, f"false, or what QServe runs: {obstacle}")

    @property
    def settings(self) -> Settings:
        """What is done to the model, with which numbers."""
        return resolve(self.quant)

    @property
    def evaluate_only(self) -> bool:
        """Whether the recipe asks for figures of the uncompressed model and nothing else."""
        return not any(vars(self.settings).values())

    @property
    def shaping(self) -> Mapping[str, object]:
        """Every value that shapes a calibration, apart from the text: what the keys come to, not how they are spelled."""
        settings = {name: value for name, value in super().shaping.items() if name not in _NOT_SETTINGS}
        resolved = dataclasses.asdict(self.settings)
        return {**settings, **{key: resolved[name] for name, key in _SETTING_KEYS.items()}}

    def warnings(self, prefix: str = "") -> tuple[str, ...]:
        """The lines of the keys without effect, and of presets that are not what their name meant elsewhere."""
        below = {path[1:]: value for path, value in self._given.items() if path[0] == "quant" and len(path) > 1}
        lines = [*super().warnings(prefix), *switched_off(self.quant, below, prefix)]
        if self.quant_type == "gchn":
            lines.append(
                f"{prefix}quant_type: gchn is the published W4A8KV4; nyuntam's file of that name is W4A8KV8 with symmetric "
                "weights, which is gchn_kv8 here"
            )
        if self.evaluate_only:
            lines.append(f"{prefix}quant_type: {NOTHING} quantizes nothing by itself: name a preset, such as gchn (W4A8KV4)")
        return tuple(lines)

    def memory_remedies(self) -> tuple[str, ...]:
        """Overrides that need less memory, those that leave the result as it is first."""
        remedies = super().memory_remedies()
        if self.calib.seq_length is None:
            return remedies
        return tuple(remedy.replace("model_seqlen=", "calib.seq_length=") for remedy in remedies)


def _error(path: KeyPath, value: object, what: str) -> InitErrorDetails:
    return InitErrorDetails(type=expected(what), loc=path, input=value)


def _completed(own: Mapping[str, object], given: Mapping[KeyPath, object]) -> dict[str, object]:
    """What the recipe says, over the preset that it names; twins stand under the key that every method has as well."""
    name = own.get("quant_type", NOTHING)
    defaults = dict(preset(ALIASES.get(name, name)) if isinstance(name, str) else {})
    moved: dict[str, object] = {}
    for twin in _TWINS:
        if twin.path in given or twin.key in own or twin.name in own:
            defaults.pop(twin.key, None)
        if twin.path in given and twin.key not in own and twin.name not in own and _is_read(twin.read, given[twin.path]):
            moved[twin.key] = given[twin.path]
    return {**over(defaults, own), **moved}


def _torn_twins(own: Mapping[str, object], given: Mapping[KeyPath, object]) -> Iterator[InitErrorDetails]:
    """Keys that are given under both names, with different values; each of them holds for itself."""
    for twin in _TWINS:
        key = twin.key if twin.key in own else twin.name
        if twin.path in given and key in own and twin.read(given[twin.path]) != twin.read(own[key]):
            yield _error(twin.path, given[twin.path], f"what {key} is, {shown(own[key])}: it is the same key")


def _is_read(read: Callable[[object], object], value: object) -> bool:
    try:
        read(value)
    except PydanticCustomError:
        return False
    return True
