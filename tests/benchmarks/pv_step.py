"""What a step of PV-Tuning costs beside a plain distillation step of the same dense model, in one run.

    python -m tests.benchmarks.pv_step --model DIR [--codebooks 2] [--batch 32] [--length 256] [--micro 8] [--steps 8]

Both steps take the same batch through the same teacher and the same loss. The plain one moves dense weights by torch's Adam;
the other moves codebooks, scales, what is not quantized, and codes. They alternate, on one thread; CPU seconds are printed,
and their ratio. ``--checkpointing`` lets both compute their activations again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algorithms.finetuning.distillation.loss import kl_divergence
from algorithms.finetuning.distillation.models import Computation, assemble, teacher_model
from algorithms.finetuning.distillation.sharding import recompute_activations
from algorithms.finetuning.distillation.students.additive_student import AdditiveStudent
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.modeling.source import ModelSource
from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.parallel.ranks import ALONE
from algorithms.quantization.aqlm.finetune_config import FinetuneConfig
from algorithms.quantization.aqlm.tuning import pv_settings


def random_codes(linear: nn.Linear, num_codebooks: int) -> AdditiveCodes:
    """Codes of eight bits for groups of eight weights; what they hold does not matter for what a step costs."""
    rows, columns = linear.weight.shape
    return AdditiveCodes(
        codes=torch.randint(256, (rows, columns // 8, num_codebooks)),
        codebooks=torch.randn(num_codebooks, 256, 1, 8) * 0.02,
        scales=torch.ones(rows),
    )


def coded_model(source: ModelSource, num_codebooks: int, how: Computation, *, recomputes: bool) -> nn.Module:
    """The student."""

    def _fill(index: int, block: nn.Module) -> nn.Module:
        loaded = source.load_block(index)
        for name in source.architecture.linears:
            linear = loaded.get_submodule(name)
            codes = random_codes(linear, num_codebooks)
            coded = CodedLinear(
                codes, linear.bias, container=torch.int16, master=torch.float32, compute=torch.float32, ranks=ALONE
            )
            loaded.set_submodule(name, coded)
        for name, parameter in loaded.named_parameters():
            parameter.requires_grad_("norm" in name)
        return loaded

    model = assemble(source, source.tensors(source.outside_names(), torch.float32), _fill, how, recomputes=recomputes)
    model.get_input_embeddings().requires_grad_(True)
    return model


def plain_step(student: nn.Module, teacher: nn.Module) -> Callable[[list[Tensor]], None]:
    """Adam on dense weights."""
    optimizer = torch.optim.Adam(student.requires_grad_(True).parameters(), lr=1e-5)

    def _step(batch: list[Tensor]) -> None:
        accumulate(student, teacher, batch)
        optimizer.step()
        optimizer.zero_grad()

    return _step


def accumulate(student: nn.Module, teacher: nn.Module, batch: list[Tensor]) -> None:
    """Forward and backward of all micro-batches."""
    tokens = sum(micro.numel() for micro in batch)
    for micro in batch:
        with torch.no_grad():
            wanted = teacher(input_ids=micro, use_cache=False).logits.flatten(0, 1)
        logits = student(input_ids=micro, use_cache=False).logits.flatten(0, 1)
        (kl_divergence(logits, wanted) / tokens).backward()


def main() -> None:
    """Print both costs and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--codebooks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, how = ModelSource(arguments.model), Computation(ranks=ALONE)
    teacher = teacher_model(source, torch.float32, how)
    dense = teacher_model(source, torch.float32, how)
    if arguments.checkpointing:
        for block in dense.get_submodule(source.architecture.blocks):
            recompute_activations(block, checkpoint)
    student = coded_model(source, arguments.codebooks, how, recomputes=arguments.checkpointing)
    tuning = AdditiveStudent(student, pv_settings(FinetuneConfig(code_trust_ratio=None)), ALONE)
    plain, costs = plain_step(dense, teacher), {"plain": 0.0, "pv": 0.0}
    for number in range(arguments.steps + 1):
        batch = list(torch.randint(source.vocab_size, (arguments.batch, arguments.length)).split(arguments.micro))
        started = time.process_time()
        plain(batch)
        between = time.process_time()
        accumulate(student, teacher, batch)
        tuning.step(number + 1, 1.0)
        if number:  # the first step warms up
            costs["plain"] += between - started
            costs["pv"] += time.process_time() - between
    each = {name: seconds / arguments.steps for name, seconds in costs.items()}
    ratio = each["pv"] / each["plain"]
    sys.stdout.write(f"plain {each['plain']:.3f} CPU s a step, PV {each['pv']:.3f}: {ratio:.2f} times as much\n")


if __name__ == "__main__":
    main()
