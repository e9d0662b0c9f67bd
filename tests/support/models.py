"""Tiny models of every family in the architecture table, written to disk as users' models are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from algorithms.blockwise.stages import write_outside
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.narrowing import Kept, narrow
from tests.support.byte_model import VOCABULARY, save_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def save_family(
    folder: Path,
    model_type: str,
    *,
    tied: bool = False,
    blocks: int = 2,
    hidden: int = 32,
    heads: int = 4,
    **changes: object,
) -> Path:
    """A randomly initialised model of a family, float32, with grouped-query attention; biases where the family has them."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=hidden // heads,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        **changes,
    )
    return save_random(folder, config)


def save_random(folder: Path, config: PretrainedConfig) -> Path:
    """A randomly initialised model of a configuration, float32, and the byte model's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            # Initialisation leaves biases at zero and norms at one, where a mistake with them would not show.
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_pruned(folder: Path, origin: Path, kept: Sequence[Kept], biased: Collection[str] = ()) -> Path:
    """A pruned calibration of a saved model, float16, with random biases for some linears of its blocks that had none."""
    source, store = ModelSource(origin), BlockStore(folder)
    generator = torch.Generator().manual_seed(1)
    for index, keeps in enumerate(kept):
        block = source.load_block(index)
        narrow(block, source.architecture, keeps)
        tensors = {name: tensor.half() for name, tensor in block.state_dict().items()}
        for name in biased:
            tensors[f"{name}.bias"] = (0.1 * torch.randn(tensors[f"{name}.weight"].shape[0], generator=generator)).half()
        store.save(index, tensors, {})
    write_outside(source, folder, source.tensors(source.outside_names()))
    return folder


def confident(folder: Path) -> Path:
    """Enlarges the weights of a fresh saved model: its distributions are all but flat, and divergences drown in rounding."""
    (file,) = folder.glob("*.safetensors")
    factors = {"lm_head": 20.0, "embed_tokens": 5.0, "proj": 5.0}
    tensors = {
        name: next((factor for part, factor in factors.items() if part in name), 1.0) * tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def token_sequences(count: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Seeded random sequences [1, length] of the byte model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for _ in range(count)]
