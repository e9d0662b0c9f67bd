"""A model folder built in code: a byte-level tokenizer whose ids can be worked out by hand, and a Llama of a few weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3
VOCABULARY = FIRST_BYTE + 256
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer that turns each byte of a text into one token and puts a BOS before it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: index for index, word in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


def byte_ids(text: str) -> list[int]:
    """The ids of a text without BOS, by the definition of byte-level tokens: the rank of each byte's stand-in character."""
    # GPT-2's table: printable bytes stand for themselves, the others for the characters from 256 on, in their order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    rank = {stand_in: FIRST_BYTE + index for index, stand_in in enumerate(sorted(character.values()))}
    return [rank[character[byte]] for byte in text.encode()]


def text_of(tokens: Tensor) -> str:
    """The text of a sequence; BOS and EOS are shown as ^ and $."""
    back = {token: byte for byte in range(128) for token in byte_ids(chr(byte))}
    return "".join({BOS: "^", EOS: "$"}.get(token) or chr(back[token]) for token in tokens.flatten().tolist())


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama of two blocks, hidden size 8, with seeded weights."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(**(sizes | {"vocab_size": VOCABULARY, "tie_word_embeddings": True} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def save_model(folder: Path, *, tokenizer: bool = True, **changes: object) -> Path:
    """Writes the model and its tokenizer as ``save_pretrained`` does."""
    tiny_llama(**changes).save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder
