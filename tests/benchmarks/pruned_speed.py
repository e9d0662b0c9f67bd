"""Tokens a second of a dense model, and of the same model pruned, padded and ragged, in one run.

    python -m tests.benchmarks.pruned_speed [--ratio 0.3] [--threads 1] [--hidden 1024] [--blocks 8] [--model DIR]

Takes a random Llama of the given size, or the model in a folder, and lets every block keep another share of its groups of heads
and of its neurons, ``1 - ratio`` of them on average, half as much more or less at the ends. Which ones does not matter for
speed. Both formats are written and loaded by their clients in float32. Prefill is one forward over ``--prompt`` tokens,
generation are ``--new`` greedy tokens after them; the models take turns, and the median of ``--rounds`` counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from algorithms.formats.checkpoint import Calibrated
from algorithms.formats.client import load
from algorithms.formats.pruned.padded import write_padded
from algorithms.formats.pruned.ragged import write_ragged
from algorithms.formats.pruned.sizes import sizes
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.narrowing import Kept, widths
from tests.support.models import save_pruned

HEAD_DIM = 64


def random_llama(folder: Path, hidden: int, blocks: int) -> Path:
    """A Llama with heads of 64 channels, two of them a group, and neurons for 8/3 of its hidden size."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM // 2,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def kept_shares(source: ModelSource, ratio: float) -> list[Kept]:
    """What the blocks keep: shares at even distances from ``1 - 1.5 * ratio`` to ``1 - 0.5 * ratio``."""
    original = widths(source.block_skeleton(), source.architecture)
    shares = (1 - torch.linspace(1.5, 0.5, source.num_blocks) * ratio).tolist()
    return [
        Kept(
            groups=tuple(range(max(1, round(share * original.groups)))),
            neurons=tuple(range(max(1, round(share * original.neurons)))),
        )
        for share in shares
    ]


def seconds(work: Callable[[], object]) -> float:
    """How long a piece of work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.no_grad()
def rates(model: nn.Module, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Tokens a second of prefill and of generation, without the prefill that comes before it."""
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    prefill = seconds(lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))
    whole = seconds(lambda: model.generate(prompt, generation_config=settings))
    return prompt.numel() / prefill, (new_tokens - 1) / (whole - prefill)


def main() -> None:
    """Print the rates, their ratios to the dense model's, and sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        origin = arguments.model or random_llama(folder / "dense", arguments.hidden, arguments.blocks)
        source = ModelSource(origin)
        calibrated = Calibrated(save_pruned(folder / "pruned", origin, kept_shares(source, arguments.ratio)))
        models = {"dense": load("dense", origin)}
        for name, write in (("padded", write_padded), ("ragged", write_ragged)):
            (folder / name).mkdir()
            write(calibrated, folder / name)
            models[name] = load(name, folder / name)
        found = sizes(calibrated)
    prompt = torch.randint(source.vocab_size, (1, arguments.prompt))
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(arguments.rounds + 1):
        for name, model in models.items():
            both = rates(model, prompt, arguments.new)
            if turn:  # the first round warms up
                measured[name].append(both)
    sys.stdout.write(f"{arguments.threads} threads, float32, prompt {arguments.prompt}, {arguments.new} new tokens\n")
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in measured.items()}
    dense = medians["dense"]
    for name, (prefill, generation) in medians.items():
        stored = found["original" if name == "dense" else name]
        sys.stdout.write(
            f"{name}: prefill {prefill:.1f} tokens/s ({prefill / dense[0]:.2f} x), "
            f"generation {generation:.2f} tokens/s ({generation / dense[1]:.2f} x), "
            f"{stored.parameters / 1e6:.1f} M parameters, {stored.cache_bytes} bytes of cache a token\n"
        )


if __name__ == "__main__":
    main()
