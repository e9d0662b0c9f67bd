"""Compress a synthetic mixture in a process that may not have as much memory as one of its blocks takes.

    python -m tests.benchmarks.mixtures.larger_than_memory [--hidden 1024] [--neurons 1536] [--experts 128] [--blocks 2]
        [--method gptq] [--megabytes 1500] [--tokens 4096]

The model, in the form of Qwen3-MoE with random weights, is written in bfloat16. Calibration and conversion to a dense export
and a packed one then run in a process of their own, which may allocate ``--megabytes`` in all (RLIMIT_DATA), libraries included
or, with ``--beyond-libraries``, on top of what it has then; without the option it is measured what they need. Printed are
sizes, peak, and time; as a counter-check, the same limit is shown to be too little for one block that is read as a whole.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from algorithms.base import Artifact, CompressionAlgorithm, StageContext
from algorithms.modeling.shards import ShardWriter
from algorithms.modeling.source import ModelSource
from algorithms.quantization.gptq.algorithm import Gptq
from algorithms.quantization.gptq.config import GptqConfig
from algorithms.quantization.rtn.algorithm import Rtn
from algorithms.quantization.rtn.config import RtnConfig

_VOCABULARY = 512
_LENGTH = 128
_SHARD_BYTES = 16_000_000  # a file that is open counts as allocated, read or not


def write_model(folder: Path, *, hidden: int, neurons: int, experts: int, blocks: int) -> int:
    """A random mixture in bfloat16, written tensor by tensor; returns its number of parameters."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=max(16, hidden // 8),
        num_experts=experts,
        num_experts_per_tok=4,
        moe_intermediate_size=neurons,
        intermediate_size=neurons,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    generator, writer, total = torch.Generator().manual_seed(0), ShardWriter(folder, shard_bytes=_SHARD_BYTES), 0
    for name, parameter in ModelSource(folder).skeleton().named_parameters():
        if parameter.ndim == 1:
            tensor = torch.ones(parameter.shape)
        else:
            tensor = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        writer.add({name: tensor.bfloat16()})
        total += tensor.numel()
    writer.close()
    return total


def plugin(method: str, tokens: int) -> CompressionAlgorithm:
    """The method, with so many tokens of calibration text where it reads any."""
    exports = ("dense", "compressed-tensors")
    if method == "rtn":
        return Rtn(RtnConfig.model_validate({"wbits": 4, "groupsize": 128}), exports=exports)
    keys = {"wbits": 4, "groupsize": 128, "nsamples": max(1, tokens // _LENGTH), "model_seqlen": _LENGTH}
    return Gptq(GptqConfig.model_validate(keys), exports=exports)


def compress(model: Path, output: Path, method: str, tokens: int) -> None:
    """Every stage of a method, into folders of ``output``."""
    source, algorithm = ModelSource(model), plugin(method, tokens)
    artifact = Artifact(kind="model", directory=model, digest="")
    generator = torch.Generator().manual_seed(1)
    for stage in algorithm.stages():
        count = 0 if stage.tokens is None else stage.tokens.num_samples
        folder = output / stage.directory
        folder.mkdir(parents=True)
        context = StageContext(
            source=source,
            tokens=[torch.randint(_VOCABULARY, (1, _LENGTH), generator=generator) for _ in range(count)],
            validation_tokens=[],
            output_dir=folder,
            scratch_dir=output / "scratch",
            device=torch.device("cpu"),
            seed=0,
            metrics=lambda record: None,
            progress=_silent,
        )
        artifact = stage.run(context, artifact)


@contextlib.contextmanager
def _silent(description: str, total: int):
    yield lambda note: None


def allocated() -> int:
    """Bytes that this process has allocated, as RLIMIT_DATA counts them."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmData"].split()[0]) * 1024


def worker(arguments: argparse.Namespace) -> None:
    """What runs under the limit: one block as a whole, or a job; writes what it had at most."""
    torch.set_num_threads(1)
    ModelSource(arguments.model).skeleton()  # libraries load much of themselves when it is needed
    if arguments.megabytes:
        allowed = int(arguments.megabytes * 1e6) + (allocated() if arguments.beyond_libraries else 0)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    if arguments.worker == "block":
        ModelSource(arguments.model).load_block(0)
    else:
        compress(arguments.model, arguments.output, arguments.method, arguments.tokens)
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f}\n")


def run_worker(kind: str, model: Path, output: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    """:func:`worker` in a process of its own."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--worker", kind]
    command += ["--model", str(model), "--output", str(output), *options]
    # glibc would keep what is freed between what is not, and the limit counts it.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def main() -> None:
    """Run the benchmark, or one of its workers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("hidden", 1024), ("neurons", 1536), ("experts", 128), ("blocks", 2), ("tokens", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=("gptq", "rtn"), default="gptq")
    parser.add_argument("--megabytes", type=float, default=0.0)
    parser.add_argument("--beyond-libraries", action="store_true", help="do not count what is allocated when imports are done")
    parser.add_argument("--worker", choices=("block", "job"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        sizes = {name: getattr(arguments, name) for name in ("hidden", "neurons", "experts", "blocks")}
        total = write_model(model, **sizes)
        block = arguments.experts * 3 * arguments.hidden * arguments.neurons
        expert = 3 * arguments.hidden * arguments.neurons
        told = f"{total / 1e9:.2f} billion parameters, {2 * total / 1e6:.0f} MB; experts of a block {4 * block / 1e6:.0f} MB"
        sys.stdout.write(f"{told} in float32, one expert {4 * expert / 1e6:.0f} MB\n")
        options = ["--method", arguments.method, "--tokens", str(arguments.tokens), "--megabytes", str(arguments.megabytes)]
        options += ["--beyond-libraries"] if arguments.beyond_libraries else []
        started = time.perf_counter()
        done = run_worker("job", model, Path(folder) / "out", options)
        sys.stdout.write(f"job: exit {done.returncode}, peak {done.stdout.strip()} MB, {time.perf_counter() - started:.0f} s\n")
        sys.stdout.write(done.stderr[-2000:] if done.returncode else "")
        if arguments.megabytes:
            whole = run_worker("block", model, Path(folder) / "none", options)
            last = whole.stderr.strip().splitlines()[-1:]
            sys.stdout.write(f"one block as a whole: exit {whole.returncode} {' '.join(last)[:120]}\n")


if __name__ == "__main__":
    main()
