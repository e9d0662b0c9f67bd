"""The block compressor of every method whose weights are codes: fit each group, tune the rounding of the block, store it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from algorithms.blockwise.stages import round_to_storage
from algorithms.finetuning.block_tuning import TuningReport
from algorithms.finetuning.config import BlockTuningKeys
from algorithms.finetuning.learned_rounding import tune_rounding
from algorithms.finetuning.tunable import TunableLinear
from algorithms.formats.checkpoint import DenseState
from algorithms.formats.storage import in_storage
from algorithms.modeling.activations import Activations
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.block_loop import BlockData
from algorithms.modeling.mixtures.deferred import defer, restore
from algorithms.modeling.mixtures.experts import READER
from algorithms.modeling.transforms.serving import AS_IT_IS, Serving
from algorithms.numerics.information.rate_distortion import rates
from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.spread import WHOLE, Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import ALONE, Ranks, share_out

_ERROR_ROWS = 256


class Coded(Protocol):
    """A weight as it is stored."""

    def dequantize(self) -> Tensor:
        """The matrix [O, I] in float32."""
        ...


Weight = TypeVar("Weight", bound=Coded)


@dataclass(frozen=True, kw_only=True)
class FreshBlock:
    """Block ``index`` before its linears are compressed, and this rank's part of the hidden states before it."""

    index: int
    block: nn.Module
    inputs: Activations | None
    architecture: ModelArchitecture
    ranks: Ranks = ALONE


@dataclass(frozen=True, kw_only=True)
class Method(Generic[Weight]):
    """What a plugin brings.

    ``fit`` turns the wanted weights [O, I] of linears that share an input into stored ones, given that input's statistics and
    how the rows of each weight are spread over processes. ``pack`` gives a weight's tensors under a prefix, ``dense_state``
    decodes all that are among a block's, ``stored_bits`` counts them. ``tunable`` makes a linear under training from a stored
    weight, the wanted one and a bias, ``tuned`` the stored weight again, and ``tune`` trains a block of them with the recipe's
    keys. ``name`` keys the randomness. With ``join``, the
    rows of a matrix can be fitted apart from each other, ``rows_together`` and their multiples at a time, and it puts such
    parts together again, in their order. ``prepare`` changes a block before its groups are fitted, without changing what it
    computes (see :meth:`algorithms.modeling.block_loop.BlockCompressor.prepare_block`), and returns figures for its report.
    Blocks of compressed linears compute as ``serving`` says: later blocks see, and make up for, what a server rounds.
    """

    name: str
    fit: Callable[[Mapping[str, Tensor], InputStatistics | None, Spread], Mapping[str, Weight]]
    pack: Callable[[Weight, str], Mapping[str, Tensor]]
    dense_state: DenseState
    stored_bits: Callable[[Weight], Mapping[str, int]]
    tunable: Callable[[Weight, Tensor, Tensor | None], TunableLinear]
    tuned: Callable[[Any, Weight], Weight]
    tune: Callable[[int, nn.Module, BlockData, Any, torch.Generator], TuningReport] = tune_rounding
    join: Callable[[Sequence[Weight]], Weight] | None = None
    rows_together: int = 1
    prepare: Callable[[FreshBlock], Mapping[str, object]] | None = None
    serving: Serving = AS_IT_IS


@dataclass(frozen=True, kw_only=True)
class _Fitted(Generic[Weight]):
    """Rows of a linear: as they are stored, as they were wanted where tuning needs them, and the sums of their report."""

    stored: Weight
    wanted: Tensor | None
    error: float
    power: float


class _Finished(nn.Linear):
    """A linear that computes what is stored."""

    def __init__(self, stored: Coded, bias: Tensor | None) -> None:
        weight = stored.dequantize()
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


class CodedCompressor(Generic[Weight]):
    """See :class:`algorithms.modeling.block_loop.BlockCompressor`.

    Args:
        method: what to do with a group of linears.
        architecture: of the model.
        tuning: block tuning; None leaves it out.
        seed: of the job.
        ranks: which share out the rows of every group, or its linears where rows cannot be fitted apart.
    """

    def __init__(
        self,
        method: Method[Weight],
        architecture: ModelArchitecture,
        *,
        tuning: BlockTuningKeys | None,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self._method, self._architecture, self._tuning, self._seed = method, architecture, tuning, seed
        self._ranks = ranks
        self._started = 0.0
        self._reports: dict[str, dict[str, object]] = {}
        self._stored: dict[str, Weight] = {}
        self._packed: dict[str, dict[str, Tensor]] = {}  # linears that are not in _stored any more
        self._prepared: Mapping[str, object] = {}

    @property
    def tunes(self) -> bool:
        """Whether block tuning follows."""
        return self._tuning is not None

    def prepare_block(self, index: int, block: nn.Module, inputs: Activations | None) -> None:
        """Start the block's account, let the method change the block, and round what is not compressed."""
        self._started, self._reports, self._stored, self._prepared = time.process_time(), {}, {}, {}
        self._packed = {}
        if self._method.prepare is not None:
            fresh = FreshBlock(index=index, block=block, inputs=inputs, architecture=self._architecture, ranks=self._ranks)
            self._prepared = self._method.prepare(fresh)
        round_to_storage(block, self._architecture.linears)
        self._serve(block)

    def compress_group(
        self, index: int, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None
    ) -> Mapping[str, nn.Module]:
        """Fit the group; with tuning, linears under training take its places, else linears that compute what is stored."""
        parts = self._ranks.exchange(self._fit_share(linears, statistics))
        modules: dict[str, nn.Module] = {}
        for name, linear in linears.items():
            mine = [part[name] for part in parts if name in part]
            stored = self._joined([part.stored for part in mine])
            finished = _Finished(stored, linear.bias)
            self._stored[name] = stored
            bits, power = self._method.stored_bits(stored), sum(part.power for part in mine)
            self._reports[name] = {
                "relative_error": sum(part.error for part in mine) / power if power else 0.0,
                "bits_per_weight": sum(bits.values()) / finished.weight.numel(),
                "bits": {**bits, "parameters": finished.weight.numel()},
            }
            modules[name] = finished
            if READER in vars(linear):
                self._pack_now(name, finished)
            if self.tunes:
                wanted = [part.wanted for part in mine if part.wanted is not None]
                modules[name] = self._method.tunable(stored, torch.cat(wanted), linear.bias)
            self._method.serving.hook(modules[name])
        self._note_rates(linears, statistics)
        return modules

    def _pack_now(self, name: str, finished: _Finished) -> None:
        """Of experts that are read one by one, codes are kept as they are stored: packed, they take the least memory."""
        self._packed[name] = packed = dict(self._method.pack(self._stored.pop(name), name))
        defer(finished, lambda: self._method.dense_state(packed)[f"{name}.weight"])

    def _note_rates(self, linears: Iterable[str], statistics: InputStatistics | None) -> None:
        """What each linear's error would cost a Gaussian matrix, for the report."""
        if self._ranks.is_main:
            errors = {name: self._reports[name]["relative_error"] for name in linears}
            for name, rate in rates(None if statistics is None else statistics.hessian(), errors).items():
                self._reports[name]["gaussian_bits"] = rate

    def _fit_share(self, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None) -> dict[str, _Fitted[Weight]]:
        """Fit what falls to this rank: a run of rows of every linear, or whole linears where rows cannot be fitted apart."""
        ranks, together, spread = self._ranks, self._method.rows_together, WHOLE
        shared = {name: slice(None) for name in linears}
        splits = all(linear.out_features // together >= ranks.size for linear in linears.values())
        if ranks.size > 1 and splits and self._method.join is not None:
            spread = Spread(index=ranks.rank, count=ranks.size, sum_=ranks.sum_)
            shared = {name: spread.run_of(linear.out_features, together) for name, linear in linears.items()}
        elif ranks.size > 1:
            owners = share_out({name: linear.weight.numel() for name, linear in linears.items()}, ranks.size)
            shared = {name: rows for name, rows in shared.items() if owners[name] == ranks.rank}
        wanted = {}
        for name, rows in shared.items():
            matrix = linears[name].weight.detach()[rows].float()
            wanted[name] = matrix if statistics is None else statistics.corrected(matrix, rows)
        stored = self._method.fit(wanted, statistics, spread) if wanted else {}
        hessian = statistics.hessian() if wanted and statistics is not None else None
        fitted = {}
        for name, matrix in wanted.items():
            total = linears[name].out_features
            error, power = _output_errors(matrix, stored[name].dequantize(), hessian, max(1, total // _ERROR_ROWS))
            kept = matrix if self.tunes else None
            fitted[name] = _Fitted(stored=stored[name], wanted=kept, error=error, power=power)
        return fitted

    def _joined(self, parts: Sequence[Weight]) -> Weight:
        if len(parts) == 1:
            return parts[0]
        assert self._method.join is not None, "without join, every linear is fitted by one rank"
        return self._method.join(parts)

    def finish_block(self, index: int, block: nn.Module, data: BlockData | None) -> dict[str, object]:
        """Tune the block if that is asked for; returns its report."""
        report: dict[str, object] = {"index": index, "linears": self._reports, **self._prepared}
        if data is not None and self._tuning is not None:
            generator = keyed_generator(self._seed, self._method.name, index, "tuning", *self._ranks.key)
            report["tuning"] = asdict(self._method.tune(index, block, data, self._tuning, generator))
            self._replace_tuned(block)
            report["output_error"] = data.output_error(block, index)
        report["cpu_seconds"] = time.process_time() - self._started
        return report

    def freeze_block(self, block: nn.Module) -> dict[str, Tensor]:
        """The block in its stored form; the block goes on with exactly these values."""
        tensors: dict[str, Tensor] = {}
        finished = {name: module for name, module in block.named_modules() if isinstance(module, _Finished)}
        for name in finished:
            tensors |= self._packed.pop(name, None) or self._method.pack(self._stored[name], name)
        tensors |= in_storage(block, {f"{name}.weight" for name in finished})
        self.restore_block(block, tensors)
        return tensors

    def restore_block(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Dense float32 linears with the stored values."""
        restore(block, tensors, self._method.dense_state)
        block.requires_grad_(False)
        self._serve(block)

    def _replace_tuned(self, block: nn.Module) -> None:
        for name, module in list(block.named_modules()):
            if isinstance(module, TunableLinear):
                self._stored[name] = self._method.tuned(module, self._stored[name])
                block.set_submodule(name, _Finished(self._stored[name], module.bias))
        self._serve(block)

    def _serve(self, block: nn.Module) -> None:
        self._method.serving.apply(block, self._architecture.linears, self._architecture)


def _output_errors(wanted: Tensor, weight: Tensor, hessian: Tensor | None, step: int) -> tuple[float, float]:
    """Squared error of the outputs, and their square, from every so many rows: all would cost as much as a sweep."""
    kept, difference = wanted[::step], (wanted - weight)[::step]
    error, power = (
        torch.sum((part if hessian is None else part @ hessian).double() * part).item() for part in (difference, kept)
    )
    return error, power
