"""Recovery tuning of small pruned models, as its tests run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from algorithms.base import StageContext
from algorithms.finetuning.distillation.loop import History
from algorithms.finetuning.recovery import recover, tensors_below, tensors_outside
from algorithms.finetuning.recovery_config import RecoveryConfig
from algorithms.modeling.source import ModelSource
from algorithms.modeling.transforms.narrowing import Kept, narrow, widths
from tests.support.models import confident, save_family
from tests.unit.algorithms.quantization.aqlm.tunings import context_of

SETTINGS = {
    "model_seqlen": 16, "max_epochs": 2, "batch_size": 4, "warmup_steps": 1, "val_size": 2, "r": 4, "eval_every_steps": 2,
}  # fmt: skip
KEY = "llm.Pruner.recovery"


def original(folder: Path, family: str = "llama", **changes: object) -> ModelSource:
    """A model of the family with confident distributions."""
    return ModelSource(confident(save_family(folder / "base", family, **changes)))


def pruned(source: ModelSource) -> nn.Module:
    """The model without one of its two groups of heads in the first block and without a third of all neurons, with biases."""
    model = source.model_from(source.tensors(source.weight_files, torch.float32))
    for index, block in enumerate(model.get_submodule(source.architecture.blocks)):
        size = widths(block, source.architecture)
        groups = (1,) if index == 0 else tuple(range(size.groups))
        narrow(block, source.architecture, Kept(groups=groups, neurons=tuple(range(0, size.neurons * 2 // 3))))
        down = block.get_submodule("mlp.down_proj")
        down.bias = nn.Parameter(torch.full((down.out_features,), 0.01), requires_grad=False)
    return model


def recovered(
    source: ModelSource, folder: Path, *, context: Mapping[str, object] = {}, keeps_zeros: bool = False, **changes: object
) -> tuple[nn.Module, History]:
    """A pruned model after its recovery in a folder; ``context`` changes what the stage is given, ``changes`` its keys."""
    model = pruned(source)
    given: StageContext = context_of(source, folder, **dict(context))
    config = RecoveryConfig.model_validate({**SETTINGS, **changes})
    return model, recover(given, source, model, config, KEY, keeps_zeros=keeps_zeros)


def tensors(model: nn.Module, source: ModelSource) -> dict[str, Tensor]:
    """All tensors of a result, as a stage reads them."""
    found = tensors_outside(model, source.outside_names())
    for index in range(source.num_blocks):
        prefix = source.block_prefix(index)
        found |= {prefix + name: tensor for name, tensor in tensors_below(model, prefix).items()}
    return found
