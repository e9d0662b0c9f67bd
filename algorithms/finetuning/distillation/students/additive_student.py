"""PV-Tuning (arXiv 2405.14852): the student whose linears are additive codes, and one step of its optimizer.

A step takes the gradient of the dense weights apart: codebooks and scales follow it by the chain rule (P-step, together with
what is not quantized); the same gradient moves a target for every weight, and codes of the few groups that are furthest from
their target are searched again (V-step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from algorithms.finetuning.distillation.adam import AdamRule, adam_step
from algorithms.finetuning.distillation.sharding import Sharding, local, part_of, whole
from algorithms.finetuning.distillation.student import StepReport
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.finetuning.distillation.students.moving import Moving, are_finite, clip
from algorithms.finetuning.distillation.students.v_step import VStepCounts, v_step
from algorithms.numerics.codebooks.additive import CodewordScatter, group, sum_codewords
from algorithms.numerics.codebooks.constrained_recode import RecodeLimits
from algorithms.parallel.ranks import Ranks

_IDLE_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class PvSettings:
    """What moves, and how.

    ``rule`` and ``lr`` hold for everything continuous, ``code_rule`` and ``code_lr`` for the targets of the codes.
    ``delta_decay`` is the share by which a target returns to the weight at every step: 1 keeps no target from step to step
    (PV-Tuning as in the paper), 0 keeps all of it (straight-through estimation). ``max_grad_norm`` clips the gradient of
    everything continuous together. The moving embeddings include the head. ``notes_codes`` tells the user of every V-step.
    """

    rule: AdamRule
    lr: float
    code_rule: AdamRule
    code_lr: float
    delta_decay: float = 0.0
    limits: RecodeLimits = field(default_factory=RecodeLimits)
    buffer_dtype: torch.dtype = torch.float32
    moves_codes: bool = True
    moves_codebooks: bool = True
    moves_scales: bool = True
    moves_norms: bool = True
    moves_embeddings: bool = True
    max_grad_norm: float | None = None
    notes_codes: bool = True
    seed: int = 0


class AdditiveStudent:
    """A model under PV-Tuning; see :class:`algorithms.finetuning.distillation.student.Student`.

    Args:
        model: its quantized linears are :class:`CodedLinear`; what else has gradients is tuned with them.
        settings: what moves, and how.
        ranks: the processes that the model is sharded over.
    """

    def __init__(self, model: nn.Module, settings: PvSettings, ranks: Ranks) -> None:
        self.model, self._settings, self._ranks = model, settings, ranks
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}
        self._others = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._targets: dict[str, Tensor] = {}
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._scatters: dict[str, CodewordScatter] = {}
        self._counts = VStepCounts()
        self._create_state()
        self.loaded()

    def values(self) -> dict[str, Tensor]:
        """The tensors that are the result, by their names in the model; they live on as the student moves."""
        return dict(self.model.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on; loading into these tensors and calling :meth:`loaded` restores it."""
        state = {f"model.{name}": tensor for name, tensor in self.values().items()}
        state |= {f"target.{name}": tensor for name, tensor in self._targets.items()}
        for name, moments in self._moments.items():
            state |= {f"moment.{kind}.{name}": tensor for kind, tensor in moments.items()}
        return state

    def loaded(self) -> None:
        """Follow values that were changed from outside."""
        self._scatters = {}
        self._keep_dense()

    def _keep_dense(self) -> None:
        """A process alone decodes each weight once, not in every pass."""
        if self._ranks.size == 1:
            for linear in self._linears.values():
                linear.keep_dense()

    def passing(self, step: int | None, sequences: Sequence[int]) -> None:
        """All sequences pass alike."""

    def set_summing(self, sums: bool) -> None:
        """Whether backward passes sum the gradients of coded weights over ranks at once."""
        for linear in self._linears.values():
            linear.sums_gradient = sums

    def discard_gradients(self) -> None:
        """Forget what backward passes have left."""
        for parameter in self._others.values():
            parameter.grad = None
        for linear in self._linears.values():
            linear.gradient = None

    def gradients_are_finite(self) -> bool:
        """Whether every rank can step."""
        gradients = [parameter.grad for parameter in self._others.values() if parameter.grad is not None]
        gradients += [linear.gradient for linear in self._linears.values() if linear.gradient is not None]
        return are_finite(gradients, self._ranks)

    @torch.no_grad()
    def step(self, number: int, factor: float) -> StepReport:
        """Move everything against the gradients that backward passes have left, and forget these.

        Args:
            number: of the step, from 1.
            factor: of the learning rates.
        """
        settings = self._settings
        continuous = list(self._continuous())
        norm = clip(continuous, settings.max_grad_norm, self._ranks)
        targets = {name: self._moved_target(name, number, factor) for name in self._linears} if settings.moves_codes else {}
        for tensor in continuous:
            self._adam(tensor.name, tensor.part, tensor.gradient, settings.rule, settings.lr * factor, number)
        own = VStepCounts()
        for name, target in targets.items():
            own += self._move_codes(name, target, number)
        self.discard_gradients()
        self._keep_dense()
        examined, proposed, changed = self._ranks.sum_numbers(own.examined, own.proposed, own.changed)
        totals = VStepCounts(examined=int(examined), proposed=int(proposed), changed=int(changed))
        self._counts += totals
        if not totals.examined:
            return StepReport(gradient_norm=norm)
        counts = {f"codes_{name}": count for name, count in asdict(totals).items()}
        return StepReport(gradient_norm=norm, counts=counts, note=self._note(totals))

    def complaint(self) -> str:
        """Hardly any code has changed."""
        examined, changed = self._counts.examined, self._counts.changed
        if changed >= _IDLE_SHARE * examined:
            return ""
        return f"the V-step does next to nothing: of {examined} groups examined in this epoch, {changed} changed; raise code_lr"

    def _note(self, counts: VStepCounts) -> str:
        if not self._settings.notes_codes:
            return ""
        return f"codes: {counts.examined} groups examined, {counts.proposed} proposed, {counts.changed} changed"

    def _create_state(self) -> None:
        settings = self._settings
        continuous: dict[str, Tensor] = dict(self._others)
        for name, linear in self._linears.items():
            continuous |= {f"{name}.codebooks": linear.codebooks} if settings.moves_codebooks else {}
            continuous |= {f"{name}.scales": linear.scales} if settings.moves_scales else {}
        self._moments = {name: settings.rule.moments(tensor.detach()) for name, tensor in continuous.items()}
        if not settings.moves_codes:
            return
        sharding = Sharding(self._ranks)
        for name, linear in self._linears.items():
            rows = self._decoded(linear)
            shaped = sharding.rows(rows.to(settings.buffer_dtype), linear.out_features)
            self._moments[f"{name}.weight"] = settings.code_rule.moments(shaped)
            if settings.delta_decay < 1:
                self._targets[name] = shaped

    def _continuous(self) -> Iterator[Moving]:
        """Everything that the P-step moves, with its gradient."""
        for name, parameter in self._others.items():
            if parameter.grad is not None:
                yield Moving(name, local(parameter), local(parameter.grad))
        for name, linear in self._linears.items():
            if linear.gradient is None or not (self._settings.moves_codebooks or self._settings.moves_scales):
                continue
            to_codebooks, to_scales = self._chain_rule(name, linear, linear.gradient)
            if self._settings.moves_codebooks:
                self._ranks.sum_(to_codebooks)
                gradient = part_of(to_codebooks, linear.codebooks)
                yield Moving(f"{name}.codebooks", local(linear.codebooks), gradient)
            if self._settings.moves_scales:
                yield Moving(f"{name}.scales", local(linear.scales), to_scales)

    def _chain_rule(self, name: str, linear: CodedLinear, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the codebooks [M*K, d], from this rank's rows alone, and of its scales."""
        codes, scales = local(linear.codes), local(linear.scales).float()
        tiles = group(gradient, linear.group_shape)
        rows = linear.rows_of(codes)
        if name not in self._scatters:
            self._scatters[name] = CodewordScatter(rows, linear.num_codebooks * linear.num_codewords)
        to_codebooks = self._scatters[name]((tiles * scales[:, None, None]).flatten(0, 1))
        unscaled = sum_codewords(rows, whole(linear.codebooks).float()).view_as(tiles)
        return to_codebooks, torch.sum(tiles * unscaled, dim=(1, 2))

    def _moved_target(self, name: str, number: int, factor: float) -> Tensor:
        """The target of a layer's weight after this step, this rank's rows; the codebooks have not moved yet."""
        linear, settings = self._linears[name], self._settings
        assert linear.gradient is not None, "every layer takes part in every pass"
        target = local(self._targets[name]) if name in self._targets else self._decoded(linear)
        rate = settings.code_lr * factor
        self._adam(f"{name}.weight", target, linear.gradient, settings.code_rule, rate, number)
        return target

    def _move_codes(self, name: str, target: Tensor, number: int) -> VStepCounts:
        linear, settings = self._linears[name], self._settings
        place = (settings.seed, "v-step", number, name)
        codebooks = whole(linear.codebooks)
        counts = v_step(linear, target, codebooks, limits=settings.limits, place=place, ranks=self._ranks)
        if counts.changed:
            self._scatters.pop(name, None)
        if name in self._targets and settings.delta_decay > 0:
            target.lerp_(self._decoded(linear).to(target.dtype), settings.delta_decay)
        return counts

    def _decoded(self, linear: CodedLinear) -> Tensor:
        """This rank's rows of a layer's weight in float32: targets do not start with the rounding of the compute dtype."""
        codebooks, scales = whole(linear.codebooks).float(), local(linear.scales).float()
        return linear.decode_exactly(local(linear.codes), codebooks, scales)

    def _adam(self, name: str, part: Tensor, gradient: Tensor, rule: AdamRule, rate: float, number: int) -> None:
        moments = {kind: local(tensor) for kind, tensor in self._moments[name].items()}
        adam_step(part, gradient, moments, rule=rule, rate=rate, step=number, sum_=self._ranks.sum_)
