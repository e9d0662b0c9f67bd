"""The command lines, as argument lists: nothing here runs, and no shell ever reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from algorithms.engines.tensorrt_llm.config import PLAIN, TensorRtLlmConfig
from algorithms.engines.tensorrt_llm.families import HIDDEN_ACT, RELEASES, ROTARY_BASE, Family

Command = tuple[str, ...]

PYTHON = "python"  # that of the PATH: TensorRT-LLM's own, which need not be the one that runs this program
BUILDER = "trtllm-build"
_BY_QUANTIZER = ("int4_awq", "fp8")  # the others are done by the converter of the model's folder


def checkpoint_name(family: Family, config: TensorRtLlmConfig) -> str:
    """The folder of a checkpoint: ``tllm_checkpoint_<folder>``, with the method where it is quantized."""
    return "_".join(["tllm_checkpoint", family.folder, *([] if config.method == PLAIN else [config.method])])


def checkpoint_script(family: Family, config: TensorRtLlmConfig) -> Path:
    """The script of TensorRT-LLM's examples that makes the checkpoint."""
    examples = config.examples_dir.absolute()
    if config.method in _BY_QUANTIZER:
        return examples / "quantization" / "quantize.py"
    return examples / RELEASES[config.release].converters / family.folder / "convert_checkpoint.py"


def checkpoint_command(family: Family, config: TensorRtLlmConfig, *, model: Path, output: Path) -> Command:
    """The command that turns a Hugging Face folder into a TensorRT-LLM checkpoint, for as many GPUs as the engine will have."""
    options = _quantizer(config, output) if config.method in _BY_QUANTIZER else _converter(family, config, output)
    name = "model_dir" if config.method in _BY_QUANTIZER else family.converter.model
    script = checkpoint_script(family, config)
    return (PYTHON, str(script), *arguments({name: model.absolute(), **options}))


def build_command(family: Family, config: TensorRtLlmConfig, *, checkpoint: Path, output: Path) -> Command:
    """The command that builds one engine file a GPU from a checkpoint."""
    recent, gpus = RELEASES[config.release].is_recent, config.gpus
    longest = config.max_input_len or family.max_input_len
    parallel = {"workers": gpus} if recent else {"workers": gpus, "gpus_per_node": gpus, "tp_size": gpus}
    output_length = {"max_seq_len": longest + config.max_output_len} if recent else {"max_output_len": config.max_output_len}
    options = {
        "output_dir": output.absolute(),
        "checkpoint_dir": checkpoint.absolute(),
        "gemm_plugin": config.dtype,
        **parallel,
        "max_batch_size": config.max_batch_size,
        "max_input_len": longest,
        **output_length,
        "max_beam_width": config.max_beam_width,
        "max_num_tokens": config.max_num_tokens,
        "max_prompt_embedding_table_size": config.max_prompt_embedding_table_size,
        "use_fused_mlp": "enable" if recent and config.use_fused_mlp else config.use_fused_mlp,
    }
    return (BUILDER, *arguments(options))


def run_command(model: Path | str, engine: Path | str) -> Command:
    """The command that lets an engine speak, by the script of TensorRT-LLM that lies beside it."""
    return (PYTHON, "run.py", *arguments({"max_output_len": 1000, "tokenizer_dir": model, "engine_dir": engine}))


def arguments(options: Mapping[str, object]) -> Command:
    """Options as words: none for null, false and 0, the name alone for true, name and value otherwise."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False or value == 0:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return tuple(words)


def _quantizer(config: TensorRtLlmConfig, output: Path) -> dict[str, object]:
    return {
        "qformat": config.method,
        "dtype": config.dtype,
        "awq_block_size": config.awq_block_size if config.method == "int4_awq" else None,
        "calib_size": config.calib_size,
        "calib_dataset": _text(config.calib_dataset),
        "output_dir": output.absolute(),
        "tp_size": config.gpus,
        RELEASES[config.release].tokenizer_length: config.max_seq_length,
        "batch_size": config.batch_size,
    }


def _converter(family: Family, config: TensorRtLlmConfig, output: Path) -> dict[str, object]:
    converter = family.converter
    ranks = None if converter.single_implied and config.gpus == 1 else config.gpus
    common = {**converter.always, "dtype": config.dtype, converter.output: output.absolute(), converter.ranks: ranks}
    facts = {"hidden_act": family.hidden_act, "rotary_base": family.rotary_base} if converter.wants_facts else {}
    if config.method == PLAIN:
        return {**common, **{name: getattr(config, name) for name in converter.plain}, **facts}
    unlike = {name: fact for name, fact in facts.items() if fact not in (HIDDEN_ACT, ROTARY_BASE)}
    if config.method == "int8":
        return {**common, **converter.weight_only, **unlike}
    told = RELEASES[config.release].is_recent
    smooth = {"smoothquant": config.smoothquant, "per_token": config.per_token, "per_channel": config.per_channel}
    text = {"calib_dataset": _text(config.calib_dataset), "calib_size": config.calib_size if told else None}
    return {**common, **smooth, **text, **unlike}


def _text(name: str | None) -> str | None:
    """A data set by its name on the hub, or by a folder's absolute path: the programs have a working folder of their own."""
    return str(Path(name).absolute()) if name is not None and Path(name).is_dir() else name
