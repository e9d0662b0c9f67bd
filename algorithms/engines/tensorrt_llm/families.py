"""What TensorRT-LLM's scripts are called and how they spell their options: by model type, and by release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ROW = "llm.TensorRTLLM"
ROTARY_BASE, HIDDEN_ACT = 10000.0, "silu"  # what llama's converter takes unless it is told


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The options of one ``convert_checkpoint.py``.

    ``model``, ``output`` and ``ranks`` are its names for the model folder, the checkpoint folder and the number of GPUs;
    ``always`` is what every call needs, ``weight_only`` what asks for int8 weights, and ``plain`` the recipe keys that it takes
    where nothing is quantized. With ``single_implied`` one GPU is left unsaid: older releases of it lack the option. With
    ``wants_facts`` it has to be told the rotary base and the activation: older releases do not read them from the model.
    """

    model: str = "model_dir"
    output: str = "output_dir"
    ranks: str = "tp_size"
    always: Mapping[str, object] = field(default_factory=dict)
    weight_only: Mapping[str, object] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    single_implied: bool = False
    wants_facts: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model type: the folder of its converter, the quantizations that work, and the longest input unless a recipe says.

    ``rotary_base`` and ``hidden_act`` are those of the model at hand.
    """

    folder: str
    converter: Converter
    methods: tuple[str, ...]
    max_input_len: int = 1024
    rotary_base: float = ROTARY_BASE
    hidden_act: str = HIDDEN_ACT


@dataclass(frozen=True, kw_only=True)
class Release:
    """What changed between releases.

    ``tag`` names the release in TensorRT-LLM's repository, ``converters`` is where below the examples folder the converters
    are, ``tokenizer_length`` how quantize.py calls the tokenizer's limit. An ``is_recent`` trtllm-build counts input and output
    together, takes plugins as ``enable``, and reads the number of GPUs from the checkpoint alone; recent scripts can be told
    the calibration text, and read from the model how it stretches its rotary embeddings.
    """

    tag: str
    converters: str
    tokenizer_length: str
    is_recent: bool


_LLAMA = Converter(
    weight_only={"use_weight_only": True, "weight_only_precision": "int8"},
    plain=("per_channel", "per_token", "int8_kv_cache", "per_group"),
    wants_facts=True,
)
_GEMMA = Converter(
    model="model-dir",
    output="output-model-dir",
    ranks="world-size",
    always={"ckpt-type": "hf"},
    weight_only={"use-weight-only-with-precision": "int8"},
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(folder="llama", converter=_LLAMA, methods=("int4_awq", "smoothquant", "fp8", "int8")),
    "mistral": Family(folder="llama", converter=_LLAMA, methods=("int4_awq", "fp8", "int8"), max_input_len=32256),
    "mixtral": Family(folder="llama", converter=_LLAMA, methods=("int4_awq", "fp8", "int8"), max_input_len=32256),
    "gemma": Family(folder="gemma", converter=_GEMMA, methods=("int4_awq", "fp8", "int8")),
    "phi": Family(folder="phi", converter=Converter(single_implied=True), methods=()),
}

RELEASES: Mapping[str, Release] = {
    "0.9": Release(tag="v0.9.0", converters="", tokenizer_length="max_seq_length", is_recent=False),
    "1.0": Release(tag="v1.0.0", converters="models/core", tokenizer_length="tokenizer_max_seq_length", is_recent=True),
}


def family_of(model_type: str, method: str | None) -> Family:
    """The row of a model type.

    Args:
        model_type: as config.json has it.
        method: the quantization; None for none.

    Raises:
        ValueError: no row has the type, or the method does not work for it; names what does.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"MODEL: no TensorRT-LLM engine for the model type {model_type!r}; there are {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    if method is None or method in family.methods:
        return family
    if not family.methods:
        raise ValueError(f"{ROW}.to_quantize: {model_type} cannot be quantized on the way; write to_quantize: false.")
    others = ", ".join(name for name, row in FAMILIES.items() if method in row.methods)
    raise ValueError(
        f"{ROW}.quant_method: {method} is not supported for {model_type}, which has {', '.join(family.methods)} "
        f"({method} works for {others}), or to_quantize: false."
    )


def told_about(family: Family, config: Mapping[str, object], release: str) -> Family:
    """The row with what the model's config.json says.

    Raises:
        ValueError: the release would leave out how the model stretches its rotary embeddings.
    """
    found = config.get("rope_parameters") or config.get("rope_scaling")
    rotary = found if isinstance(found, Mapping) else {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind != "default" and not RELEASES[release].is_recent:
        raise ValueError(
            f"MODEL: its rotary embeddings are stretched ({kind}), which TensorRT-LLM {release} does not read; "
            f"{ROW}.release: {next(name for name, row in RELEASES.items() if row.is_recent)} does."
        )
    base = config.get("rope_theta") or rotary.get("rope_theta") or ROTARY_BASE
    return replace(family, rotary_base=float(str(base)), hidden_act=str(config.get("hidden_act", HIDDEN_ACT)))
