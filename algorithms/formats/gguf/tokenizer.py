"""A byte-level BPE tokenizer as GGUF metadata, from tokenizer.json: what llama.cpp turns text into tokens with.

llama.cpp knows the ways to cut a text before the merges by name only, so a tokenizer is embedded where its way has a name here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFWriter

logger = logging.getLogger(__name__)

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.json's pre-tokenizer, as _signature gives it -> llama.cpp's name of it.
_PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA3, "ByteLevel without cutting"): "llama-bpe",
}


def add_tokenizer(writer: GGUFWriter, folder: Path, config: Mapping[str, object]) -> bool:
    """Embed the tokenizer of a folder; False, with a line in the log, where it is not a byte-level BPE that llama.cpp knows.

    Args:
        writer: takes the metadata.
        folder: holds tokenizer.json.
        config: config.json of the model, with the size of the vocabulary and the special ids.
    """
    from gguf import TokenType

    file = folder / "tokenizer.json"
    if not file.is_file():
        logger.warning("The GGUF file has no tokenizer: there is no tokenizer.json in %s", folder)
        return False
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    kind = _pre_tokenizer(tokenizer)
    if kind is None:
        logger.warning("The GGUF file has no tokenizer: %s is no byte-level BPE that llama.cpp has a name for", file)
        return False
    size = int(config["vocab_size"])  # type: ignore[call-overload]
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, int(TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    _add_special(writer, tokenizer, config)
    return True


def _add_special(writer: GGUFWriter, tokenizer: Mapping, config: Mapping[str, object]) -> None:
    ids = {name: config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    numbers = {name: value[0] if isinstance(value, list) else value for name, value in ids.items()}
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id), ("pad", writer.add_pad_token_id)):
        if numbers[name] is not None:
            add(numbers[name])
    writer.add_add_bos_token(numbers["bos"] is not None and _first_special(tokenizer) == numbers["bos"])


def _pre_tokenizer(tokenizer: Mapping) -> str | None:
    model = tokenizer["model"]
    plain = not tokenizer.get("normalizer") and not model.get("byte_fallback")
    if model.get("type") != "BPE" or not plain or not model["merges"]:  # GGUF has no empty arrays
        return None
    return _PRE_TOKENIZERS.get(_signature(tokenizer.get("pre_tokenizer") or {}))


def _signature(pre_tokenizer: Mapping) -> tuple[str, ...]:
    if pre_tokenizer.get("type") == "Sequence":
        return tuple(part for step in pre_tokenizer["pretokenizers"] for part in _signature(step))
    if pre_tokenizer.get("type") == "Split":
        return (pre_tokenizer["pattern"].get("Regex", ""),)
    if pre_tokenizer.get("add_prefix_space") or pre_tokenizer.get("individual_digits") is False:
        return ("other",)
    kind = pre_tokenizer.get("type", "")
    return (kind if pre_tokenizer.get("use_regex", True) else f"{kind} without cutting",)


def _first_special(tokenizer: Mapping) -> int | None:
    """The id that the tokenizer puts before a text, if any."""
    processor = tokenizer.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    for step in steps:
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
    return None
