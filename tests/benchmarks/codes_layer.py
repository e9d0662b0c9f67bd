"""What GPTQ, AWQ and SpQR need for one layer of real size, and the error they leave, on one thread.

    python -m tests.benchmarks.codes_layer [--size 4096]

The Hessian comes from correlated inputs whose spectrum falls over five decades. Prints CPU seconds of the fit (factor, sweep,
refinement) and the relative error of the outputs, beside rounding to nearest with the same bits and groups. Of AWQ's search,
which comes before its codes, the seconds alone, and what share of the error its factors leave.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from algorithms.modeling.transforms.survey import ChannelStatistics
from algorithms.numerics.statistics import InputStatistics
from algorithms.quantization.awq.calibration import fit as fit_awq
from algorithms.quantization.awq.config import AwqConfig
from algorithms.quantization.awq.search import ScaleSearch
from algorithms.quantization.gptq.calibration import fit as fit_gptq
from algorithms.quantization.gptq.config import GptqConfig
from algorithms.quantization.rtn.calibration import fit as fit_rtn
from algorithms.quantization.rtn.config import RtnConfig
from algorithms.quantization.spqr.calibration import fit as fit_spqr
from algorithms.quantization.spqr.config import SpqrConfig


def problem(size: int) -> tuple[Tensor, InputStatistics]:
    """A Gaussian matrix [size, size] and statistics of 8 size tokens."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator) * 0.02
    mixing = torch.randn(size, size, generator=generator) * torch.logspace(0, -2.5, size)[:, None]
    statistics = InputStatistics(size)
    for _ in range(4):
        statistics.update(torch.randn(2 * size, size, generator=generator) @ mixing)
    return matrix, statistics


def main() -> None:
    """Run the benchmark and print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    matrix, statistics = problem(arguments.size)
    hessian = statistics.hessian()
    power = torch.sum((matrix @ hessian) * matrix)
    fits = {
        "GPTQ 4 bit g128": lambda: fit_gptq({"w": matrix}, statistics, GptqConfig(bits=4)),
        "GPTQ 3 bit g128": lambda: fit_gptq({"w": matrix}, statistics, GptqConfig(bits=3)),
        "AWQ 3 bit g128, gptq: false": lambda: fit_awq({"w": matrix}, statistics, AwqConfig(bits=3, gptq=False)),
        "RTN 3 bit g128": lambda: fit_rtn({"w": matrix}, RtnConfig(bits=3)),
        "SpQR 3 bit g16": lambda: fit_spqr({"w": matrix}, statistics, SpqrConfig(bits=3)),
        "SpQR 3 bit g16, 4.1 bits": lambda: fit_spqr({"w": matrix}, statistics, SpqrConfig(bits=3, target_bits=4.1)),
    }
    for name, run in fits.items():
        started = time.process_time()
        weight = run()["w"]
        seconds = time.process_time() - started
        difference = matrix - weight.dequantize()
        error = torch.sum((difference @ hessian) * difference) / power
        sys.stdout.write(f"{name:28} {seconds:6.1f} CPU s   relative error {error:.5f}\n")
        sys.stdout.flush()
    sizes = hessian.diagonal().sqrt() * (2 / torch.pi) ** 0.5  # mean |x| of Gaussian inputs
    channels = ChannelStatistics(hessian=hessian, mean_size=sizes, largest=4 * sizes)
    for name, config in (("AWQ's search", AwqConfig(bits=3)), ("AWQ's search, gptq: false", AwqConfig(bits=3, gptq=False))):
        started = time.process_time()
        chosen = ScaleSearch(config).best([matrix], channels)
        seconds, share = time.process_time() - started, chosen.loss / chosen.plain_loss
        sys.stdout.write(f"{name:28} {seconds:6.1f} CPU s   {chosen.candidate.label} leaves {share:.2f} of the error\n")


if __name__ == "__main__":
    main()
