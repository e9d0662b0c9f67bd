"""A neural decoder beside vector quantization and normal floats at the same stored bits, on one thread.

    python -m tests.benchmarks.reallm.residual_coders --model DIR --tokens FILE.pt [--linear NAME ...] [--bits 2 3 4]
        [--sequences 16] [--published]

Codes linears of a model without any low-rank part, under the Hessian of their inputs. Prints of each, once rows and columns
have one size, the correlations of neighbours in rows and in columns and the kurtosis, and for each coder all stored bits a
weight, relative errors of the weights and of the outputs, |dW| / |W| and the same under the Hessian, and CPU seconds. VQ has
vectors of two weights and NF what its name says; the decoder gets as many bits as the larger of them takes. ``--published``
adds a decoder in the shape of ReALLM's code: five strides of 2, embeddings of 16 channels, squared errors of pixels, a rate of
1e-3 and an encoder to the end, for 400 epochs at 8.3 bits.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from algorithms.numerics.residuals.coder import ResidualCoder
from algorithms.numerics.residuals.neural.budget import DecoderSizes
from algorithms.numerics.residuals.neural.coder import NeuralCoder
from algorithms.numerics.residuals.neural.training import TrainingSettings
from algorithms.numerics.residuals.nf import NormalFloatCoder
from algorithms.numerics.residuals.vq import VectorCoder, VectorSettings

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def problems(model: Path, tokens: Path, linears: list[str], sequences: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight [O, I] and Hessian [I, I] of linears by their names below the model's layers."""
    running = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = {name: running.get_submodule(f"model.layers.{name}") for name in linears}
    sums = {name: torch.zeros(module.in_features, module.in_features) for name, module in modules.items()}

    def _watch(name: str) -> None:
        def _hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].flatten(0, -2)
            sums[name] += flat.T @ flat

        modules[name].register_forward_pre_hook(_hook)

    for name in linears:
        _watch(name)
    seen = 0
    with torch.no_grad():
        for sequence in torch.load(tokens, weights_only=True)[:sequences]:
            running(sequence.view(1, -1))
            seen += sequence.numel()
    return {name: (module.weight.detach().clone(), sums[name] / seen) for name, module in modules.items()}


def whiteness(matrix: Tensor) -> tuple[float, float, float]:
    """Correlation of neighbours in rows and in columns, and kurtosis: 0, 0 and 3 for normal noise."""
    for side in (1, 0):
        matrix = matrix / matrix.square().mean(side, keepdim=True).sqrt()
    power = matrix.square().mean()
    across, down = (matrix[:, 1:] * matrix[:, :-1]).mean() / power, (matrix[1:] * matrix[:-1]).mean() / power
    return across.item(), down.item(), (matrix.pow(4).mean() / power.square()).item()


def measure(label: str, coder: ResidualCoder, matrix: Tensor, hessian: Tensor) -> float:
    """Print one line; returns bits a weight."""
    started = time.process_time()
    coded = coder.encode(matrix, hessian, torch.Generator().manual_seed(0))
    seconds = time.process_time() - started
    difference = matrix - coded.dequantize()
    plain = (difference.norm() / matrix.norm()).item()
    seen = (torch.sum((difference @ hessian) * difference) / torch.sum((matrix @ hessian) * matrix)).sqrt().item()
    bits = sum(coded.bits().values()) / matrix.numel()
    sys.stdout.write(f"  {label:22} {bits:6.3f} bits   weights {plain:.3f}   outputs {seen:.4f}   {seconds:7.1f} CPU s\n")
    sys.stdout.flush()
    return bits


def published() -> NeuralCoder:
    """The shape and the training of ReALLM's code, at the bits that it was measured with."""
    sizes = DecoderSizes(
        bits=8.3, strides=(2,) * 5, patch_size=128, embedding_dim=16, embedding_bits=8, weight_bits=6, block_size=64
    )
    settings = TrainingSettings(epochs=400, lr=1e-3, batch_size=2, encoder_width=64, encoder_share=1.0)
    return NeuralCoder(sizes, settings, loss="l2")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--linear", nargs="+", default=[f"0.{name}" for name in LINEARS])
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--published", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = problems(arguments.model, arguments.tokens, arguments.linear, arguments.sequences)
    for name, (matrix, hessian) in found.items():
        across, down, kurtosis = whiteness(matrix)
        sys.stdout.write(f"{name} {tuple(matrix.shape)}: neighbours {across:.3f}, {down:.3f}; kurtosis {kurtosis:.2f}\n")
        for bits in arguments.bits:
            vector = VectorCoder(VectorSettings(code_bits=2 * bits, bucket=2))
            taken = measure(f"VQ {bits} bits, bucket 2", vector, matrix, hessian)
            taken = max(taken, measure(f"NF{bits}", NormalFloatCoder(bits), matrix, hessian))
            measure("neural decoder", NeuralCoder(DecoderSizes(bits=taken), TrainingSettings()), matrix, hessian)
        if arguments.published:
            measure("decoder as published", published(), matrix, hessian)


if __name__ == "__main__":
    main()
