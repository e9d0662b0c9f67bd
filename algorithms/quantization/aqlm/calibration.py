"""AQLM calibration: additive codebooks for every linear of a block, then block tuning (arXiv 2401.06118)."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from algorithms.blockwise.stages import round_to_storage
from algorithms.finetuning.block_tuning import TuningSettings, tune_block
from algorithms.formats.aqlm import dense_state, pack
from algorithms.formats.storage import in_storage, to_storage
from algorithms.modeling.activations import Activations
from algorithms.modeling.block_loop import BlockData
from algorithms.modeling.mixtures.deferred import restore
from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.numerics.codebooks.additive_fit import AdditiveSettings, fit_additive
from algorithms.numerics.information.rate_distortion import rates
from algorithms.numerics.randomness import keyed_generator
from algorithms.numerics.spread import WHOLE, Spread
from algorithms.numerics.statistics import InputStatistics
from algorithms.parallel.ranks import ALONE, Ranks, share_out
from algorithms.quantization.aqlm.config import CalibrationConfig
from algorithms.quantization.aqlm.weight import AqlmLinear, stored_bits

logger = logging.getLogger(__name__)

# Peak Adam steps as fractions of a tensor's root mean square, used where the recipe names no finetune_lr: they hold at every
# width, where an absolute rate does not. Measured in this folder's README.
_CODEBOOK_STEP, _OTHER_STEP = 0.033, 0.003
_TUNING_TOKENS = 2048
# More points move k-means' centres by less than the first solve of the codebooks does.
_POINTS_PER_CENTROID = 256
# Further iterations of a round fit the codebooks to codes that are about to change.
_SOLVER_ITERATIONS = 4
# How much more than its fair share of a group's weights one rank may get before rows are shared out rather than linears.
_FAIR = 1.25
# With fewer weights for each rank, splitting a linear costs more in messages than it saves.
_LEAST_WEIGHTS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class _Progress:
    started: float
    linears: dict[str, dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """Rows of a linear, the losses of the whole fit, and <W H, W> of the rows."""

    weight: AdditiveCodes
    losses: Sequence[float]
    power: float


class AqlmCompressor:
    """What AQLM does with a block; see :class:`algorithms.modeling.block_loop.BlockCompressor`.

    Ranks share out the linears of a group; where one of them is too large for that, the rows of each, with common codebooks.
    """

    def __init__(self, config: CalibrationConfig, linears: Sequence[str], ranks: Ranks = ALONE) -> None:
        self._config = config
        self._linears = linears
        self._ranks = ranks
        self._settings = fit_settings(config)
        self._block = _Progress(started=0.0, linears={})

    @property
    def tunes(self) -> bool:
        """Whether block tuning follows."""
        return self._config.finetune_max_epochs > 0

    def prepare_block(self, index: int, block: nn.Module, inputs: Activations | None) -> None:
        """Round what is not compressed, and start the block's account."""
        round_to_storage(block, self._linears)
        self._block = _Progress(started=time.process_time(), linears={})

    def compress_group(
        self, index: int, linears: Mapping[str, nn.Linear], statistics: InputStatistics | None
    ) -> Mapping[str, nn.Module]:
        """Fit additive codebooks to each linear under the Hessian of their common input."""
        assert statistics is not None
        parts = self._ranks.exchange(self._fit_share(index, linears, statistics))
        finished = {
            name: self._finished(index, name, linear, [part[name] for part in parts if name in part])
            for name, linear in linears.items()
        }
        if self._ranks.is_main:
            reports = {name: self._block.linears[name] for name in linears}
            errors = {name: report["relative_error"] for name, report in reports.items()}
            for name, rate in rates(statistics.hessian(), errors).items():
                reports[name]["gaussian_bits"] = rate
        return finished

    def _fit_share(self, index: int, linears: Mapping[str, nn.Linear], statistics: InputStatistics) -> dict[str, _Fitted]:
        """Whole linears where they can be shared out evenly, else a run of rows of each, all ranks at one linear at a time."""
        ranks = self._ranks
        sizes = {name: linear.weight.numel() for name, linear in linears.items()}
        if ranks.size > 1 and self._splits(linears):
            spread = Spread(index=ranks.rank, count=ranks.size, sum_=ranks.sum_)
            return {name: self._fit(index, name, linear, statistics, spread) for name, linear in linears.items()}
        mine = [name for name, owner in share_out(sizes, ranks.size).items() if owner == ranks.rank]
        return {name: self._fit(index, name, linears[name], statistics, WHOLE) for name in linears if name in mine}

    def _splits(self, linears: Mapping[str, nn.Linear]) -> bool:
        """Whether one of the linears is more than a rank's fair share, and all are large enough to be split."""
        sizes = [linear.weight.numel() for linear in linears.values()]
        least = self._ranks.size * self._settings.group_shape[0]
        return max(sizes) * self._ranks.size > _FAIR * sum(sizes) and all(
            linear.weight.numel() >= self._ranks.size * _LEAST_WEIGHTS and linear.out_features >= least
            for linear in linears.values()
        )

    def _fit(self, index: int, name: str, linear: nn.Linear, statistics: InputStatistics, spread: Spread) -> _Fitted:
        rows = spread.run_of(linear.out_features, self._settings.group_shape[0])
        matrix, hessian = statistics.corrected(linear.weight.detach()[rows].float(), rows), statistics.hessian()
        generator = keyed_generator(self._config.seed, "aqlm", index, name)
        fit = fit_additive(matrix, hessian, self._settings, generator, spread)
        return _Fitted(weight=fit.weight, losses=fit.losses, power=torch.sum((matrix @ hessian) * matrix).item())

    def _finished(self, index: int, name: str, linear: nn.Linear, parts: Sequence[_Fitted]) -> nn.Module:
        weight, losses = AdditiveCodes.joined([part.weight for part in parts]), parts[0].losses
        power = sum(part.power for part in parts)
        bits = stored_bits(tuple(weight.codes.shape), tuple(weight.codebooks.shape))
        num_groups = weight.codes.shape[0] * weight.codes.shape[1]
        if num_groups < self._settings.num_codewords:
            logger.warning(
                "block %d %s has %d groups, fewer than %d codewords: its codebooks are padded and cost it %.1f bits a weight",
                index, name, num_groups, self._settings.num_codewords, sum(bits.values()) / linear.weight.numel(),
            )  # fmt: skip
        self._block.linears[name] = {
            "relative_error": losses[-1] / power if power else 0.0,
            "rounds": len(losses) - 1,
            "bits_per_weight": sum(bits.values()) / linear.weight.numel(),
        }
        if not self.tunes:
            books, scales = (to_storage(tensor, name).float() for tensor in (weight.codebooks, weight.scales))
            weight = weight.replace(codebooks=books, scales=scales)
        return AqlmLinear(weight, linear.bias)

    def finish_block(self, index: int, block: nn.Module, data: BlockData | None) -> dict[str, object]:
        """Tune codebooks, scales, norms and biases of the block; returns its report."""
        report: dict[str, object] = {"index": index, "linears": self._block.linears}
        if data is not None:
            generator = keyed_generator(self._config.seed, "aqlm", index, "tuning", *self._ranks.key)
            settings = tuning_settings(self._config, sequence_length=data.sequence_length)
            report["tuning"] = asdict(tune_block(index, block, data, self._learning_rates(block), settings, generator))
        if data is not None and not self._config.skip_out_loss:
            report["output_error"] = data.output_error(block, index)
        report["cpu_seconds"] = time.process_time() - self._block.started
        self._block = _Progress(started=0.0, linears={})
        return report

    def freeze_block(self, block: nn.Module) -> dict[str, Tensor]:
        """The block in its stored form, rounded to float16; the block goes on with exactly these values."""
        tensors: dict[str, Tensor] = {}
        packed = {name: module for name, module in block.named_modules() if isinstance(module, AqlmLinear)}
        for name, module in packed.items():
            tensors |= pack(module.current(), name)
        tensors |= in_storage(block, {f"{name}.{part}" for name in packed for part in ("codebooks", "scales")})
        for name, module in packed.items():
            no, ni, _ = module.current().codes.shape
            og, ig = module.current().group_shape
            linear = nn.Linear(ni * ig, no * og, bias=module.bias is not None, device="meta")
            block.set_submodule(name, linear)
        self.restore_block(block, tensors)
        return tensors

    def restore_block(self, block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Dense float32 linears with the stored values."""
        restore(block, tensors, dense_state)
        block.requires_grad_(False)

    def _learning_rates(self, block: nn.Module) -> list[tuple[nn.Parameter, float]]:
        given = self._config.finetune_lr
        codebooks = {id(module.codebooks) for module in block.modules() if isinstance(module, AqlmLinear)}
        rates = []
        for parameter in block.parameters():
            step = _CODEBOOK_STEP if id(parameter) in codebooks else _OTHER_STEP
            size = parameter.detach().square().mean().sqrt().item()
            rates.append((parameter, given or step * (size or 1.0)))  # a bias that starts at zero has no size of its own
        return rates


def fit_settings(config: CalibrationConfig) -> AdditiveSettings:
    """The recipe's keys as the fit of one matrix understands them."""
    codewords = 1 << config.bits_per_codebook
    per_centroid = config.init_max_points_per_centroid or _POINTS_PER_CENTROID
    return AdditiveSettings(
        num_codebooks=config.num_codebooks,
        num_codewords=codewords,
        group_shape=(config.out_group_size, config.in_group_size),
        beam_size=config.beam_size,
        init_iterations=config.init_max_iterations,
        max_points=per_centroid * codewords,
        max_rounds=config.max_epochs,
        solver_iterations=min(_SOLVER_ITERATIONS, config.steps_per_epoch),
        relative_tolerance=config.relative_mse_tolerance,
    )


def tuning_settings(config: CalibrationConfig, *, sequence_length: int) -> TuningSettings:
    """The recipe's keys as block tuning understands them; without local_batch_size a micro-batch has about 2048 tokens."""
    return TuningSettings(
        max_epochs=config.finetune_max_epochs,
        batch_size=config.finetune_batch_size,
        micro_batch_size=config.local_batch_size or max(1, _TUNING_TOKENS // sequence_length),
        betas=(config.finetune_adam_beta1, config.finetune_adam_beta2),
        early_stop=config.finetune_early_stop,
        keep_best=config.finetune_keep_best,
        recompute=config.use_checkpointing,
        log_every=config.print_frequency,
    )
