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

# The packages beside transformers that a stranger needs. Formats that are not here are plain transformers.
_PACKAGES = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "compressed-tensors": ("compressed_tensors",),
    "gguf": ("gguf",),
    "peft": ("peft",),
}
_ELSEWHERE = {
    "awq": "gptqmodel and vLLM read it, and neither installs beside this project's torch and transformers",
    "gptq": "gptqmodel and vLLM read it, and neither installs beside this project's torch and transformers",
    "qserve": "QServe and SGLang read it, on CUDA alone",
    "spqr-tiles": "the spqr_quant package reads it, on CUDA in float16 alone, and transformers 5 cannot load it through that",
    "tensorrt-llm": "an engine runs in TensorRT-LLM alone, on the kind of GPU that it was built for",
}


def no_client(client_format: str, directory: Path) -> str | None:
    """Why nothing here can read ``directory`` in this format, in a sentence; None where something can."""
    if client_format in _ELSEWHERE:
        return _ELSEWHERE[client_format]
    needed = ["transformers", *_PACKAGES.get(client_format, ())]
    if client_format == "aqlm":
        from transformers import AutoConfig

        settings = AutoConfig.from_pretrained(directory).quantization_config
        if settings["nbits_per_codebook"] == 8:
            needed.append("numba")  # the CPU kernel for 256 codewords; other sizes are decoded by torch
    missing = next((name for name in needed if importlib.util.find_spec(name) is None), None)
    return missing and f"package {missing} is not installed"


def load(client_format: str, directory: Path) -> torch.nn.Module:
    """The model of a folder in float32 on the CPU, by the format's own client."""
    from transformers import AutoModelForCausalLM

    if client_format == "spqr":
        from algorithms.formats.spqr.packed import load_packed

        return load_packed(directory)
    if client_format == "reallm":
        from algorithms.formats.reallm.packed import load_packed as load_reallm

        return load_reallm(directory)
    if client_format == "peft":
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
        return PeftModel.from_pretrained(base, directory).eval()
    if client_format == "ragged":
        from algorithms.formats.pruned.ragged import load_shipped

        return load_shipped(directory)
    options = {"gguf_file": "model.gguf"} if client_format == "gguf" else {}
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    if client_format == "compressed-tensors":
        _compute_experts_in_float32(model)
    return (_widened(model, directory) if client_format == "auto-round" else model).eval()


def _compute_experts_in_float32(model: torch.nn.Module) -> None:
    """Experts that transformers has unpacked stay in float16, whatever dtype was asked for, and compute so."""
    for parameter in model.parameters():
        if parameter.ndim == 3 and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


@torch.no_grad()
def record(client_format: str, directory: Path, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and greedy continuations of token rows [n, length], by the format's client in float32 on the CPU."""
    model = load(client_format, directory)
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


def _widened(model: torch.nn.Module, directory: Path) -> torch.nn.Module:
    """An auto-round model in float32, which it is asked for and does not give.

    Its loader forces float16, in which logits are off by 6e-3 of their deviation: that says nothing about the file. What the
    file holds is float16 and comes back whole; the rotary frequencies do not, and are computed anew.
    """
    from algorithms.modeling.source import ModelSource

    torch.nn.Module.float(model)  # transformers' own method refuses quantized models
    held = set(model.state_dict())
    for name, buffer in ModelSource(directory).skeleton().named_buffers():
        if name not in held:
            model.get_buffer(name).copy_(buffer)
    return model


def main(arguments: list[str]) -> int:
    """Run the check; returns the exit code."""
    client_format, directory, tokens_file, out_file = arguments[0], *map(Path, arguments[1:4])
    reason = no_client(client_format, directory)
    if reason is not None:
        sys.stderr.write(f"no client for {client_format} on this machine: {reason}\n")
        return NO_CLIENT
    save_file(record(client_format, directory, load_file(tokens_file)["tokens"]), out_file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
