"""The block compressor of every method whose weights are codes: fit each group, tune the rounding of the block, store it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from algorithms.blockwise.stages import round_to_storage
from algorithms.finetuning.config import BlockTuningConfig
from algorithms.finetuning.learned_rounding import RoundingLinear, tune_rounding
from algorithms.formats.checkpoint import DenseState
from algorithms.formats.storage import to_storage
from algorithms.modeling.block_loop import BlockData, relative_output_error
from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.statistics import InputStatistics

_ERROR_ROWS = 256


class Coded(Protocol):
    """A weight as it is stored."""

    def dequantize(self) -> Tensor:
        """The matrix [O, I] in float32."""
        ...


Weight = TypeVar("Weight", bound=Coded)


@dataclass(frozen=True, kw_only=True)
class Method(Generic[Weight]):
    """What a plugin brings.

    ``fit`` turns the wanted weights [O, I] of linears that share an input into stored ones, given that input's statistics;
    ``pack`` gives a weight's tensors under a prefix, ``dense_state`` decodes all that are among a block's, ``stored_bits``
    counts them. ``tunable`` makes a linear under training from a stored weight, the wanted one and a bias, and ``tuned`` the
    stored weight again. ``name`` keys the randomness.
    """

    name: str
    fit: Callable[[Mapping[str, Tensor], InputStatistics | None], Mapping[str, Weight]]
    pack: Callable[[Weight, str], Mapping[str, Tensor]]
    dense_state: DenseState
    stored_bits: Callable[[Weight], Mapping[str, int]]
    tunable: Callable[[Weight, Tensor, Tensor | None], RoundingLinear]
    tuned: Callable[[RoundingLinear, Weight], Weight]


class _Finished(nn.Linear):
    """A linear that computes what is stored."""

    def __init__(self, stored: Coded, bias: Tensor | None) -> None:
        weight = stored.dequantize()
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.stored = stored


class CodedCompressor(Generic[Weight]):
    """See :class:`algorithms.modeling.block_loop.BlockCompressor`.

    Args:
        method: what to do with a group of linears.
        linears: the compressed linears of a block.
        tuning: block tuning; None leaves it out.
        seed: of the job.
    """

    def __init__(self, method: Method[Weight], linears: Sequence[str], *, tuning: BlockTuningConfig | None, seed: int) -> None:
        self._method, self._linears, self._tuning, self._seed = method, linears, tuning, seed
        self._started = 0.0
        self._reports: dict[str, dict[str, object]] = {}
        self._stored: dict[str, Weight] = {}

    @property
    def tunes(self) -> bool:
        """Whether block tuning follows."""
        return self._tuning is not None

    def prepare_block(self, index: int, block: nn.Module) -> None:
        """Round what is not compressed, and start the block's account."""
        round_to_storage(block, self._linears)
        self._started, self._reports, self._stored = time.process_time(), {}, {}

    def compress_group(
        self, index: int, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None
    ) -> Mapping[str, nn.Module]:
        """Fit the group; with tuning, linears under training take its places, else linears that compute what is stored."""
        wanted = {name: linear.weight.detach().float() for name, linear in linears.items()}
        if statistics is not None:
            wanted = {name: statistics.corrected(matrix) for name, matrix in wanted.items()}
        weights = self._method.fit(wanted, statistics)
        hessian = None if statistics is None else statistics.hessian()
        modules: dict[str, nn.Module] = {}
        for name, linear in linears.items():
            finished = _Finished(weights[name], linear.bias)
            self._stored[name] = weights[name]
            bits = self._method.stored_bits(weights[name])
            self._reports[name] = {
                "relative_error": _relative_error(wanted[name], finished.weight, hessian),
                "bits_per_weight": sum(bits.values()) / finished.weight.numel(),
                "bits": {**bits, "parameters": finished.weight.numel()},
            }
            modules[name] = self._method.tunable(weights[name], wanted[name], linear.bias) if self.tunes else finished
        return modules

    def finish_block(self, index: int, block: nn.Module, data: BlockData | None) -> dict[str, object]:
        """Tune the block if that is asked for; returns its report."""
        report: dict[str, object] = {"index": index, "linears": self._reports}
        if data is not None and self._tuning is not None:
            generator = keyed_generator(self._seed, self._method.name, index, "tuning")
            report["tuning"] = asdict(tune_rounding(index, block, data, self._tuning, generator))
            self._replace_tuned(block)
            report["output_error"] = relative_output_error(block, index, *data.judged)
        report["cpu_seconds"] = time.process_time() - self._started
        return report

    def freeze_block(self, block: nn.Module) -> dict[str, Tensor]:
        """The block in its stored form; the block goes on with exactly these values."""
        tensors: dict[str, Tensor] = {}
        finished = {name: module for name, module in block.named_modules() if isinstance(module, _Finished)}
        for name in finished:
            tensors |= self._method.pack(self._stored[name], name)
        for name, parameter in block.named_parameters():
            if name.removesuffix(".weight") not in finished:
                tensors[name] = to_storage(parameter.detach(), name)
        self.restore_block(block, tensors)
        return tensors

    def restore_block(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Dense float32 linears with the stored values."""
        block.load_state_dict(self._method.dense_state(tensors), assign=True)
        block.requires_grad_(False)

    def _replace_tuned(self, block: nn.Module) -> None:
        for name, module in list(block.named_modules()):
            if isinstance(module, RoundingLinear):
                self._stored[name] = self._method.tuned(module, self._stored[name])
                block.set_submodule(name, _Finished(self._stored[name], module.bias))


def _relative_error(wanted: Tensor, weight: Tensor, hessian: Tensor | None) -> float:
    """Squared error of the outputs over their square, from a sample of rows: all of them would cost as much as a sweep."""
    rows = slice(None, None, max(1, wanted.shape[0] // _ERROR_ROWS))
    kept, difference = wanted[rows], (wanted - weight)[rows]
    error, power = (
        torch.sum((part if hessian is None else part @ hessian).double() * part).item() for part in (difference, kept)
    )
    return error / power if power else 0.0
