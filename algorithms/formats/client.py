"""Load a compressed folder the way a stranger would, in a process of its own, and write down what it computes.

    python -m algorithms.formats.client FORMAT MODEL_DIR TOKENS_FILE OUT_FILE

TOKENS_FILE holds ``tokens`` [n, length] int64; OUT_FILE receives ``logits`` [n, length, vocabulary] float32 and ``greedy``
[n, 16] int64, the continuation of each row. Exit code 3: this machine lacks the client (the reason is on stderr).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NO_CLIENT = 3
NEW_TOKENS = 16


def missing_package(client_format: str, directory: Path) -> str | None:
    """The package that reading ``directory`` in this format needs and this environment lacks, if any."""
    needed = ["transformers"]
    if client_format == "aqlm":
        from transformers import AutoConfig

        needed.append("aqlm")
        settings = AutoConfig.from_pretrained(directory).quantization_config
        if settings["nbits_per_codebook"] == 8:
            needed.append("numba")  # the CPU kernel for 256 codewords; other sizes are decoded by torch
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


@torch.no_grad()
def record(directory: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and greedy continuations of token rows [n, length], by stock transformers in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.eval()
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    greedy = greedy_continuation(model, tokens)
    return {"logits": logits.contiguous(), "greedy": greedy.contiguous()}


@torch.no_grad()
def greedy_continuation(model: torch.nn.Module, rows: torch.Tensor, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    """The most likely next tokens [n, new_tokens] after each row [n, length]; no end-of-text rule, so rows stay equal."""
    sequence = rows
    for _ in range(new_tokens):
        following = model(input_ids=sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, following], dim=1)
    return sequence[:, rows.shape[1] :]


def main(arguments: list[str]) -> int:
    """Run the check; returns the exit code."""
    client_format, directory, tokens_file, out_file = arguments[0], *map(Path, arguments[1:4])
    missing = missing_package(client_format, directory)
    if missing is not None:
        sys.stderr.write(f"no client for {client_format} on this machine: package {missing} is not installed\n")
        return NO_CLIENT
    save_file(record(directory, load_file(tokens_file)["tokens"]), out_file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
