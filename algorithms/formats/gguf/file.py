"""A whole llama model as one GGUF file, as llama.cpp and transformers (``gguf_file=``) read it.

Symmetric codes fit two of its types without loss. Both lay 32 neighbouring columns out as a block with its own float16 scale d:
Q4_0, 18 bytes: d, then 16 bytes with code j low and code j + 16 high, w = d * (code - 8); Q8_0, 34 bytes: d, then code - 128
as int8, w = d * code. A larger group repeats its scale in each of its blocks. Other matrices are float16, vectors float32.

The rows of q and k stand in ggml's rope order, where the two halves that rotate together are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algorithms.formats.gguf.tokenizer import add_tokenizer
from algorithms.formats.storage import WHOLE_ROW, to_storage
from algorithms.modeling.source import ModelError
from algorithms.numerics.uniform import UniformCodes

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE_NAME = "model.gguf"
BLOCK = 32
_TYPES = {4: "Q4_0", 8: "Q8_0"}


def write(
    directory: Path,
    *,
    source_config: Mapping[str, object],
    tensors: Iterable[tuple[str, Tensor | UniformCodes]],
    name: str = "model",
    tokenizer_folder: Path | None = None,
) -> Path:
    """Write ``directory/model.gguf`` and return its path.

    One tensor is held in memory at a time: data go to a file beside the result first, since GGUF puts the table of all tensors
    before them, so that the folder needs twice the room for a moment.

    Args:
        directory: an existing folder.
        source_config: config.json of a model that :func:`architecture_refusal` accepts.
        tensors: name of the parameter (``model.layers.0.mlp.up_proj.weight``) and its value; a tied head may be left out.
        name: what the file calls the model.
        tokenizer_folder: holds the tokenizer.json to embed; llama.cpp needs one, transformers does not.

    Raises:
        ModelError: codes that no type holds, a value beyond float16, or a tensor that llama does not have.
    """
    from gguf import GGUFWriter

    path, partial, spool = (directory / part for part in (FILE_NAME, f".{FILE_NAME}.partial", ".tensors.partial"))
    writer = GGUFWriter(partial, "llama", use_temp_file=True)
    try:
        with spool.open("w+b") as stream:
            writer.temp_file = stream  # of our own, since the writer's would fill /tmp
            bits = _add_all(writer, tensors, source_config)
            _add_metadata(writer, source_config, name, bits)
            if tokenizer_folder is not None:
                add_tokenizer(writer, tokenizer_folder, source_config)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        for left in (partial, spool):
            left.unlink(missing_ok=True)
    return path


def blocks(weight: UniformCodes, name: str) -> Tensor:
    """The bytes [O, I/32 * 18 or 34] uint8 of a matrix in Q4_0 or Q8_0.

    Raises:
        ModelError: other bits or groups, zeros off the middle, or a scale that float16 cannot hold.
    """
    O, I = weight.codes.shape
    reason = refusal(
        bits=weight.bits,
        symmetric=bool((weight.zeros == 1 << (weight.bits - 1)).all()),
        group_size=weight.group_size,
        has_column_groups=weight.groups is not None,
    )
    if reason is not None:
        raise ModelError(f"{name}: {reason}")
    scales = to_storage(weight.scales, name).repeat_interleave(weight.group_size // BLOCK, 1).contiguous()
    codes = weight.codes.reshape(O, I // BLOCK, BLOCK)
    nibbles = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    payload = nibbles if weight.bits == 4 else codes ^ 0x80  # code - 128 in two's complement
    head = scales.flatten().view(torch.uint8).view(O, I // BLOCK, 2)
    return torch.cat([head, payload], dim=-1).view(O, -1)


def refusal(*, bits: int, symmetric: bool, group_size: int, has_column_groups: bool) -> str | None:
    """Why weights of these settings cannot be written in this layout, in a sentence; None where they can.

    Args:
        bits: of a code.
        symmetric: every zero is 2^(bits - 1).
        group_size: columns that share a scale; -1 stands for the whole row.
        has_column_groups: the columns of a group are not neighbours.
    """
    if bits not in _TYPES:
        return f"GGUF holds whole codes of 4 (Q4_0) or 8 bits (Q8_0), and wbits is {bits}."
    if not symmetric:
        return "GGUF's Q4_0 and Q8_0 have no zero points; set sym: true."
    if group_size != WHOLE_ROW and group_size % BLOCK:
        return f"GGUF's blocks are {BLOCK} columns wide; set groupsize: {BLOCK} or a multiple of it, not {group_size}."
    if has_column_groups:
        return "GGUF's blocks are neighbouring columns, which act_order: true gives only with static_groups: true."
    return None


def architecture_refusal(config: Mapping[str, object]) -> str | None:
    """Why a model of this config.json cannot be written, in a sentence; None where it can."""
    family = config.get("model_type")
    if family != "llama":
        return f"GGUF export is written for llama models, and this one is {family}."
    biased = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if biased:
        return f"transformers gives a llama of a GGUF file no biases, and this one has {biased[0]}."
    if config.get("hidden_act", "silu") != "silu":
        return f"llama in GGUF has the activation silu, and this model {config['hidden_act']}."
    kind = _rope(config)[1]
    if kind != "default":
        return f"transformers drops the rope scaling of a GGUF file, and this model has {kind}."
    return None


def _add_all(writer: GGUFWriter, tensors: Iterable[tuple[str, Tensor | UniformCodes]], config: Mapping[str, object]) -> int:
    """Hand all tensors to the writer; returns the bits of the codes among them, 16 where there are none."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, _number(config, "num_hidden_layers"))
    bits = 16
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
            continue
        stem, _, suffix = name.rpartition(".")
        known = names.get_name(stem)
        if known is None:
            raise ModelError(f"GGUF has no place for {name} in a llama model")
        bits = tensor.bits if isinstance(tensor, UniformCodes) else bits
        _add(writer, f"{known}.{suffix}", _reordered(name, tensor, config))
    return bits


def _add(writer: GGUFWriter, name: str, tensor: Tensor | UniformCodes) -> None:
    from gguf import GGMLQuantizationType

    if isinstance(tensor, UniformCodes):
        kind = GGMLQuantizationType[_TYPES.get(tensor.bits, "F16")]
        writer.add_tensor(name, blocks(tensor, name).cpu().numpy(), raw_dtype=kind)
        return
    stored = tensor.float() if tensor.dim() == 1 else to_storage(tensor, name)
    writer.add_tensor(name, stored.detach().cpu().contiguous().numpy())


def _reordered(name: str, tensor: Tensor | UniformCodes, config: Mapping[str, object]) -> Tensor | UniformCodes:
    heads = _number(config, "num_attention_heads")
    if ".k_proj." in name:
        heads = _number(config, "num_key_value_heads", heads)
    elif ".q_proj." not in name:
        return tensor
    rows = tensor.codes.shape[0] if isinstance(tensor, UniformCodes) else tensor.shape[0]
    order = torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()
    if isinstance(tensor, UniformCodes):
        order = order.to(tensor.codes.device)
        return replace(tensor, codes=tensor.codes[order], scales=tensor.scales[order], zeros=tensor.zeros[order])
    return tensor[order.to(tensor.device)]


def _add_metadata(writer: GGUFWriter, config: Mapping[str, object], name: str, bits: int) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    heads = _number(config, "num_attention_heads")
    head_dim = _number(config, "head_dim", _number(config, "hidden_size") // heads)
    kinds = {4: LlamaFileType.MOSTLY_Q4_0, 8: LlamaFileType.MOSTLY_Q8_0}
    writer.add_name(name)
    writer.add_vocab_size(_number(config, "vocab_size"))
    writer.add_context_length(_number(config, "max_position_embeddings", 2048))
    writer.add_embedding_length(_number(config, "hidden_size"))
    writer.add_block_count(_number(config, "num_hidden_layers"))
    writer.add_feed_forward_length(_number(config, "intermediate_size"))
    writer.add_head_count(heads)
    writer.add_head_count_kv(_number(config, "num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)[0])
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))  # type: ignore[arg-type]
    writer.add_file_type(kinds.get(bits, LlamaFileType.MOSTLY_F16))
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _number(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int):
        raise ModelError(f"config.json gives no {key}, which a GGUF file states")
    return value


def _rope(config: Mapping[str, object]) -> tuple[float, str]:
    """Base and kind of the rotary embedding, in the spelling of transformers 5 or of 4."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    assert isinstance(given, Mapping)
    base = given.get("rope_theta", config.get("rope_theta", 10000.0))
    return float(base), str(given.get("rope_type", given.get("type", "default")))
