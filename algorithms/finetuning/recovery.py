"""Recovery tuning: a compressed model of dense weights learns the original's distributions again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from algorithms.base import StageContext, StageError
from algorithms.finetuning.distillation.adam import AdamRule
from algorithms.finetuning.distillation.loop import History, LoopSettings
from algorithms.finetuning.distillation.models import Computation, computed_dtype, spread
from algorithms.finetuning.distillation.sharding import whole
from algorithms.finetuning.distillation.stage import Teaching, distilled, hold_out, refuse_half_products
from algorithms.finetuning.distillation.students.dense_student import DenseSettings, DenseStudent
from algorithms.finetuning.distillation.students.lora import LoraSettings, LoraStudent, adapt
from algorithms.finetuning.recovery_config import RecoveryConfig
from algorithms.modeling.source import ModelSource

_ALL_LINEARS = "all-linear"


def recover(
    context: StageContext,
    source_teacher: ModelSource,
    student_model: nn.Module,
    config: RecoveryConfig,
    key: str,
    *,
    keeps_zeros: bool = False,
) -> History:
    """Tune a model against the original one, in the stage's folder, from whose checkpoints it goes on.

    The model is used up: :func:`tensors_below` and :func:`tensors_outside` read the result from it, and nothing else does.

    Args:
        context: the stage's, with its ranks, tokens and displays; every rank has to come along.
        source_teacher: the original model.
        student_model: of the same architecture, whose linears may be narrower or have biases; whole, on every rank.
        config: the recipe's keys.
        key: the recipe's block, for messages.
        keeps_zeros: whether entries of matrices that are exactly zero stay so.

    Returns:
        What happened; if that is not usable, neither is the model.

    Raises:
        StageError: the keys do not fit the text, the device or the model.
    """
    ranks = context.ranks
    refuse_half_products(config.amp_dtype, context.device, key)
    source = source_teacher.with_attention(config.attn_implementation)
    how = Computation(ranks=ranks, amp_dtype=computed_dtype(config.amp_dtype, context.device, f"{key}.amp_dtype"))
    split = hold_out(context.tokens, config.validation_size, judges=config.keep_best, seed=config.seed, key=key)
    if config.attn_implementation is not None:
        student_model.set_attn_implementation(config.attn_implementation)
    student_model.float().requires_grad_(False)
    dense = _dense_settings(config, keeps_zeros)
    student: DenseStudent
    if config.method == "lora":
        student = LoraStudent(_with_adapters(student_model, source, config, key, how, keeps_zeros), dense, ranks)
    else:
        student = DenseStudent(_with_gradients(student_model, source, config, how), dense, ranks)
    teaching = Teaching(
        name="recovery tuning",
        key=key,
        rates="lr",
        load_dtype=config.load_dtype,
        cached=config.teacher_cache,
        micro_batch_size=config.micro_batch_size,
    )
    history = distilled(context, source, student, split, settings=LoopSettings.of(config), teaching=teaching, how=how)
    student.finish()
    return history


def tensors_below(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Parameters of a recovered model in float32 on the CPU, named relative to ``prefix``; every rank has to ask."""
    return {
        name.removeprefix(prefix): whole(parameter.detach()).cpu()
        for name, parameter in model.named_parameters()
        if name.startswith(prefix)
    }


def tensors_outside(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The same, of the given full names; a tied head may go by either of its two."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: whole(parameters[name].detach()).cpu() for name in names}


def _dense_settings(config: RecoveryConfig, keeps_zeros: bool) -> DenseSettings:
    rule = AdamRule(beta1=config.adam_beta1, beta2=config.adam_beta2, eps=config.adam_eps, lamb=config.uses_lamb)
    return DenseSettings(
        rule=rule,
        lr=config.rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        # Adapters have zeros to start with; they see to the weights' themselves.
        keeps_zeros=keeps_zeros and config.method == "full",
    )


def _with_gradients(model: nn.Module, source: ModelSource, config: RecoveryConfig, how: Computation) -> nn.Module:
    """The model with gradients wanted for matrices, and as the recipe says for vectors and for embeddings and head."""
    ends = {id(p) for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    for parameter in model.parameters():
        is_vector = parameter.dim() < 2
        moves = config.update_embeddings if id(parameter) in ends else config.update_norms or not is_vector
        parameter.requires_grad_(moves)
    return spread(model, source, lambda index, block: block, how, recomputes=config.gradient_checkpointing)


def _with_adapters(
    model: nn.Module, source: ModelSource, config: RecoveryConfig, key: str, how: Computation, keeps_zeros: bool
) -> nn.Module:
    """The model with adapters beside the linears that the recipe names."""
    chosen = targets(source.architecture.linears, config.target_modules, key)
    settings = LoraSettings(
        rank=config.rank, alpha=config.alpha, dropout=config.dropout, keeps_zeros=keeps_zeros, seed=config.seed
    )

    def _fill(index: int, block: nn.Module) -> nn.Module:
        adapt({name: block.get_submodule(name) for name in chosen}, block, settings, source.block_prefix(index))
        return block

    return spread(model, source, _fill, how, recomputes=config.gradient_checkpointing)


def targets(linears: Sequence[str], endings: Sequence[str], key: str) -> list[str]:
    """Those of a block's linears whose names end like one of ``target_modules``.

    Raises:
        StageError: a target that no linear ends like.
    """
    if not endings or _ALL_LINEARS in endings:
        return list(linears)
    found = {ending: [name for name in linears if f".{name}".endswith(f".{ending}")] for ending in endings}
    unknown = [ending for ending, names in found.items() if not names]
    if unknown:
        raise StageError(
            f"{key}.target_modules: no linear of a block is named {', '.join(unknown)}. There are {', '.join(linears)}."
        )
    return [name for name in linears if any(name in names for names in found.values())]
