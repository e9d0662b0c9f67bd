"""The finetune stage: PV-Tuning of a calibrated model against the original one (arXiv 2405.14852)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext, StageError
from algorithms.blockwise.stages import hand_on, tune_calibrated, write_outside
from algorithms.finetuning.distillation.adam import AdamRule
from algorithms.finetuning.distillation.loop import LoopSettings
from algorithms.finetuning.distillation.models import Computation, assemble, computed_dtype
from algorithms.finetuning.distillation.sharding import local, whole
from algorithms.finetuning.distillation.stage import Teaching, distilled, hold_out, refuse_half_products
from algorithms.finetuning.distillation.students.additive_student import AdditiveStudent, PvSettings
from algorithms.finetuning.distillation.students.coded_linear import CodedLinear
from algorithms.formats.aqlm import pack, packed_linears, unpack
from algorithms.formats.checkpoint import Calibrated
from algorithms.formats.storage import to_storage
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.numerics.codebooks.additive import AdditiveCodes
from algorithms.numerics.codebooks.constrained_recode import RecodeLimits
from algorithms.parallel.ranks import Ranks
from algorithms.quantization.aqlm.finetune_config import FinetuneConfig

logger = logging.getLogger(__name__)

TUNED = "aqlm-finetune"
_REPORT = "tuning.json"
_CONTAINERS = {"uint8": torch.int8, "uint16": torch.int16}


def finetune(context: StageContext, artifact: Artifact, config: FinetuneConfig) -> Artifact:
    """Tune what the calibration left; leaves the same layout, and ``tuning.json`` with the losses of every step."""
    calibrated = Calibrated(artifact.directory)
    return tune_calibrated(
        context, artifact, lambda: _tune(context, calibrated, config), kind=TUNED, report=_REPORT, name="PV-Tuning"
    )


def _tune(context: StageContext, calibrated: Calibrated, config: FinetuneConfig) -> None:
    ranks, key = context.ranks, "llm.AQLM.finetune_config"
    source = context.source.with_attention(config.attn_implementation)
    _check(config, source, context.device)
    how = Computation(
        ranks=ranks,
        amp_dtype=computed_dtype(config.amp_dtype, context.device, f"{key}.amp_dtype"),
        gathers_in_amp=config.use_fsdp_amp,
        separately=config.wrap_separately,
    )
    split = hold_out(context.tokens, config.validation_size, judges=config.keep_best_model, seed=config.seed, key=key)
    student = AdditiveStudent(student_model(source, calibrated, config, how), pv_settings(config), ranks)
    before = _codes(student.model)
    teaching = Teaching(
        name="PV-Tuning",
        key=key,
        rates="lr or code_lr",
        load_dtype=config.load_dtype,
        cached=config.teacher_cache,
        micro_batch_size=config.microbatch_size,
    )
    history = distilled(context, source, student, split, settings=loop_settings(config), teaching=teaching, how=how)
    shares = dict.fromkeys(before, 0.0)
    if history.is_usable:
        shares = _changed(before, student.model, ranks)
        _write(context.output_dir, source, calibrated, student.model, ranks)
    elif ranks.is_main:
        logger.warning("PV-Tuning came to nothing: the calibrated model is handed on as it was")
        hand_on(calibrated, context.output_dir)
    if ranks.is_main:
        atomic_write_json(context.output_dir / _REPORT, {**asdict(history), "changed_codes": shares})


def _check(config: FinetuneConfig, source: ModelSource, device: torch.device) -> None:
    """Refuse what shows only once the device and the model are known.

    Raises:
        StageError: which key to change.
    """
    key = "llm.AQLM.finetune_config"
    refuse_half_products(config.amp_dtype, device, key)
    if not config.wrap_separately:
        return
    classes = {type(module).__name__ for module in source.skeleton().modules()}
    unknown = [name for name in config.wrap_separately if name not in classes]
    if unknown:
        raise StageError(f"{key}.wrap_separately: the model has no {', '.join(unknown)}. It has {', '.join(sorted(classes))}.")


def pv_settings(config: FinetuneConfig) -> PvSettings:
    """The recipe's keys as the optimizer understands them."""
    shared = {"lamb": config.lamb, "amsgrad": config.amsgrad, "debias": config.debias}
    return PvSettings(
        rule=AdamRule(beta1=config.adam_beta1, beta2=config.adam_beta2, **shared),
        lr=config.lr,
        code_rule=AdamRule(beta1=config.code_beta1, beta2=config.code_beta2, sixteen_bit=config.code_adam_16bit, **shared),
        code_lr=config.code_lr,
        delta_decay=config.delta_decay,
        limits=RecodeLimits(
            max_change=config.max_code_change_per_step,
            trust_ratio=config.code_trust_ratio,
            forced=config.force_code_update,
            temperature=config.code_selection_temperature,
            beam_size=config.beam_size,
        ),
        buffer_dtype=getattr(torch, config.straight_through_buffer_dtype),
        max_grad_norm=config.max_grad_norm,
        notes_codes=config.verbose_optimizer,
        seed=config.seed,
        **{f"moves_{name}": moves for name, moves in config.moves.items()},
    )


def loop_settings(config: FinetuneConfig) -> LoopSettings:
    """The recipe's keys as the loop understands them."""
    return LoopSettings(
        max_epochs=config.max_epochs,
        batch_size=config.batch_size,
        micro_batch_size=config.microbatch_size,
        schedule=config.lr_schedule,
        warmup_steps=config.warmup_steps,
        evaluate_every=config.eval_every_steps,
        save_every=config.save_every_steps,
        print_every=config.print_every_steps,
        keep_best=config.keep_best_model,
        sums_once=config.minimize_sync,
        seed=config.seed,
    )


def student_model(source: ModelSource, calibrated: Calibrated, config: FinetuneConfig, how: Computation) -> nn.Module:
    """The calibrated model with :class:`CodedLinear` layers, gradients wanted for what the recipe tunes."""
    master = computed_dtype(config.master_dtype, how.ranks.device, "llm.AQLM.finetune_config.master_dtype")
    container = _CONTAINERS.get(config.code_dtype) or getattr(torch, config.code_dtype)
    stored = calibrated.blocks()

    def _fill(index: int, block: nn.Module) -> nn.Module:
        number, tensors = next(stored)
        assert number == index, "blocks are read in order"
        packed = packed_linears(list(tensors))
        for name in packed:
            weight, bias = unpack(tensors, name), tensors.get(f"{name}.bias")
            block.set_submodule(name, _coded(weight, bias, container, master, how))
        inside = tuple(f"{name}." for name in packed)
        others = {name: tensor.to(master) for name, tensor in tensors.items() if not name.startswith(inside)}
        block.load_state_dict(others, strict=False, assign=True)
        for name, parameter in block.named_parameters():
            is_code = name.rpartition(".")[2] in ("codes", "codebooks", "scales") and name.startswith(inside)
            parameter.requires_grad_(config.moves["norms"] and not is_code)
        return block

    outside = {name: tensor.to(master) for name, tensor in calibrated.outside().items()}
    model = assemble(source, outside, _fill, how, recomputes=config.gradient_checkpointing)
    ends = [id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()]
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{source.architecture.blocks}."):
            parameter.requires_grad_(config.moves["embeddings" if id(parameter) in ends else "norms"])
    return model


def _coded(
    weight: AdditiveCodes, bias: Tensor | None, container: torch.dtype, master: torch.dtype, how: Computation
) -> CodedLinear:
    device = how.ranks.device
    weight = AdditiveCodes(
        codes=weight.codes.to(device), codebooks=weight.codebooks.to(device), scales=weight.scales.to(device)
    )
    bias = None if bias is None else bias.to(device)
    return CodedLinear(weight, bias, container=container, master=master, compute=how.amp_dtype, ranks=how.ranks)


def _codes(model: nn.Module) -> dict[str, Tensor]:
    """This rank's codes [rows, ni, M] of every linear, as they are now."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}
    return {name: local(linear.codes.detach()).clone() for name, linear in linears.items()}


def _changed(before: Mapping[str, Tensor], model: nn.Module, ranks: Ranks) -> dict[str, float]:
    """The share of all groups whose codes are other than before, by linear."""
    after = _codes(model)
    counts = [float(torch.any(before[name] != after[name], dim=-1).sum()) for name in before]
    sizes = [float(codes[..., 0].numel()) for codes in before.values()]
    totals = ranks.sum_numbers(*counts, *sizes)
    return {name: totals[place] / totals[place + len(before)] for place, name in enumerate(before)}


def _write(
    directory: Path,
    source: ModelSource,
    calibrated: Calibrated,
    model: nn.Module,
    ranks: Ranks,
) -> None:
    """The tuned model in the layout of a calibration, block by block; every rank has to come along."""
    parts, store = _Parts(model), BlockStore(directory)
    for index in range(source.num_blocks):
        tensors = parts.below(source.block_prefix(index))
        if ranks.is_main:
            store.save(index, tensors, {"index": index})
    outside = parts.outside(f"{source.architecture.blocks}.", list(calibrated.outside()))
    if ranks.is_main:
        write_outside(calibrated.source, directory, outside)


class _Parts:
    """The tensors of a tuned model as they are stored."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Everything in one block, named relative to it."""
        tensors: dict[str, Tensor] = {}
        for name, linear in self._linears.items():
            if name.startswith(prefix):
                tensors |= pack(_additive(linear), name.removeprefix(prefix))
        inside = tuple(f"{name}.{part}" for name in self._linears for part in ("codes", "codebooks", "scales"))
        for name, parameter in self._model.named_parameters():
            if name.startswith(prefix) and name not in inside:
                tensors[name.removeprefix(prefix)] = to_storage(whole(parameter.detach()).cpu(), name)
        return tensors

    def outside(self, blocks: str, names: Sequence[str]) -> dict[str, Tensor]:
        """Everything that belongs to no block, under the names that were stored before: a tied head has one of two."""
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        return {name: whole(parameters[name].detach()).cpu() for name in names if not name.startswith(blocks)}


def _additive(linear: CodedLinear) -> AdditiveCodes:
    codes, codebooks, scales = (whole(t.detach()).cpu() for t in (linear.codes, linear.codebooks, linear.scales))
    return AdditiveCodes(
        codes=linear.unsigned(codes),
        codebooks=codebooks.float().view(linear.num_codebooks, linear.num_codewords, *linear.group_shape),
        scales=scales.float(),
    )
