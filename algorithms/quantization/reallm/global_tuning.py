"""ReALLM's global tuning: low-rank parts, magnitudes and what else may move, of all blocks together."""

from __future__ import annotations

import logging
from dataclasses import asdict

import torch
from torch import Tensor, nn

from algorithms.base import Artifact, StageContext
from algorithms.blockwise.stages import facts, hand_on, tune_calibrated, write_outside
from algorithms.finetuning.distillation.adam import AdamRule
from algorithms.finetuning.distillation.loop import LoopSettings
from algorithms.finetuning.distillation.models import Computation, assemble, computed_dtype
from algorithms.finetuning.distillation.sharding import whole
from algorithms.finetuning.distillation.stage import Teaching, distilled, hold_out, refuse_half_products
from algorithms.finetuning.distillation.students.dense_student import DenseSettings, DenseStudent
from algorithms.formats.checkpoint import Calibrated
from algorithms.formats.reallm.packed import LAYOUT, pack, unpack
from algorithms.formats.storage import to_storage
from algorithms.modeling.block_store import BlockStore
from algorithms.modeling.files import atomic_write_json
from algorithms.modeling.source import ModelSource
from algorithms.parallel.ranks import moved
from algorithms.quantization.reallm.tuning_config import CAUSAL_LM, GlobalTuningConfig
from algorithms.quantization.reallm.weight import LowRankLinear

logger = logging.getLogger(__name__)

KIND = "reallm-finetune_global"
_KEY = "llm.ReALLM.global_tuning"
_FACTS = "calibration.json"


def tune_globally(context: StageContext, artifact: Artifact, config: GlobalTuningConfig) -> Artifact:
    """Tune what the stages before have left; leaves the same layout, and in calibration.json the losses of every step."""
    return tune_calibrated(
        context, artifact, lambda: _tune(context, artifact, config), kind=KIND, report=_FACTS, name="Global tuning"
    )


def _tune(context: StageContext, artifact: Artifact, config: GlobalTuningConfig) -> None:
    ranks, directory, calibrated = context.ranks, context.output_dir, Calibrated(artifact.directory)
    refuse_half_products(config.amp_dtype, context.device, _KEY)
    source = context.source.with_attention(config.attn_implementation)
    how = Computation(ranks=ranks, amp_dtype=computed_dtype(config.amp_dtype, context.device, f"{_KEY}.amp_dtype"))
    split = hold_out(context.tokens, config.validation_size, judges=config.keep_best, seed=config.seed, key=_KEY)
    student = DenseStudent(student_model(source, calibrated, config, how), _dense_settings(config), ranks)
    teaching = Teaching(
        name="global tuning",
        key=_KEY,
        rates="lr",
        load_dtype=config.load_dtype,
        cached=config.teacher_cache,
        micro_batch_size=config.micro_batch_size,
        from_text=config.loss == CAUSAL_LM,
    )
    history = distilled(context, source, student, split, settings=LoopSettings.of(config), teaching=teaching, how=how)
    student.finish()
    if history.is_usable:
        _write(context, calibrated, student.model)
    elif ranks.is_main:
        logger.warning("Global tuning came to nothing: the model is handed on as it was")
        hand_on(calibrated, directory)
    if ranks.is_main:
        atomic_write_json(directory / _FACTS, {**facts(artifact.directory), "global_tuning": asdict(history)})


def student_model(source: ModelSource, calibrated: Calibrated, config: GlobalTuningConfig, how: Computation) -> nn.Module:
    """The compressed model with :class:`LowRankLinear` layers, gradients wanted for what the recipe tunes."""
    stored = calibrated.blocks()

    def _fill(index: int, block: nn.Module) -> nn.Module:
        number, tensors = next(stored)
        assert number == index, "blocks are read in order"
        tensors = moved(tensors, how.ranks.device)
        packed = LAYOUT.packed_linears(list(tensors))
        inside = tuple(f"{name}." for name in packed)
        others = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith(inside)}
        for name in packed:
            bias = tensors.get(f"{name}.bias")
            block.set_submodule(name, LowRankLinear(unpack(tensors, name), None if bias is None else bias.float()))
        block.load_state_dict(others, strict=False, assign=True)
        for name, parameter in block.named_parameters():
            inner = name.startswith(inside) and not name.endswith(".bias")
            is_coding = inner and ".coded." in name
            moves = config.update_residual if is_coding else inner or config.update_norms
            parameter.requires_grad_(moves and parameter.numel() > 0)
        return block

    outside = {name: tensor.float() for name, tensor in calibrated.outside().items()}
    model = assemble(source, outside, _fill, how, recomputes=config.gradient_checkpointing)
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{source.architecture.blocks}."):
            parameter.requires_grad_(config.update_embeddings if id(parameter) in ends else config.update_norms)
    return model


def _write(context: StageContext, calibrated: Calibrated, model: nn.Module) -> None:
    """The tuned model in the layout of a calibration, block by block; every rank has to come along."""
    store, is_main = BlockStore(context.output_dir), context.ranks.is_main
    linears = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    codings = tuple(f"{name}.{part}" for name in linears for part in ("up", "down", "magnitude", "coded."))
    for index in range(context.source.num_blocks):
        prefix = context.source.block_prefix(index)
        tensors: dict[str, Tensor] = {}
        for name, linear in linears.items():
            if name.startswith(prefix):
                tensors |= pack(linear.stored(whole), name.removeprefix(prefix))
        for name, parameter in model.named_parameters():
            if name.startswith(prefix) and not name.startswith(codings):
                tensors[name.removeprefix(prefix)] = to_storage(whole(parameter.detach()), name)
        if is_main:
            store.save(index, moved(tensors, torch.device("cpu")), {"index": index})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    outside = {name: whole(parameters[name].detach()).cpu() for name in calibrated.outside()}
    if is_main:
        write_outside(calibrated.source, context.output_dir, outside)


def _dense_settings(config: GlobalTuningConfig) -> DenseSettings:
    rule = AdamRule(beta1=config.adam_beta1, beta2=config.adam_beta2, eps=config.adam_eps, lamb=config.lr is None)
    return DenseSettings(rule=rule, lr=config.rate, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)
