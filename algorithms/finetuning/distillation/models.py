"""Teacher and student, read and sharded one block at a time: no rank ever holds a whole model that several share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from algorithms.finetuning.distillation.sharding import Sharding, recompute_activations
from algorithms.modeling.source import ModelError, ModelSource
from algorithms.parallel.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How teacher and student compute.

    ``amp_dtype`` is that of matrix products, ``gathers_in_amp`` lets sharded parameters travel in it too. Modules of the
    classes ``separately`` are gathered on their own.
    """

    ranks: Ranks
    amp_dtype: torch.dtype = torch.float32
    gathers_in_amp: bool = False
    separately: Sequence[str] = ()

    @property
    def sharding(self) -> Sharding:
        """How models are spread over the ranks."""
        return Sharding(self.ranks, self.amp_dtype if self.gathers_in_amp else None)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which a model runs."""
        if self.amp_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.ranks.device.type, dtype=self.amp_dtype)


def computed_dtype(name: str, device: torch.device, key: str) -> torch.dtype:
    """A dtype of the recipe, or float32 where the device has no arithmetic for it."""
    dtype: torch.dtype = getattr(torch, name)
    if dtype == torch.float16 and device.type == "cpu":
        logger.warning("%s: float16 is computed in float32 on a CPU", key)
        return torch.float32
    return dtype


def teacher_model(source: ModelSource, dtype: torch.dtype, how: Computation) -> nn.Module:
    """The original model, without gradients."""

    def _load(index: int, block: nn.Module) -> nn.Module:
        return source.load_block(index, dtype=dtype)

    outside = source.tensors(source.outside_names(), dtype)
    return assemble(source, outside, _load, how).requires_grad_(False)


def assemble(
    source: ModelSource,
    outside: Mapping[str, Tensor],
    fill: Callable[[int, nn.Module], nn.Module],
    how: Computation,
    *,
    recomputes: bool = False,
) -> nn.Module:
    """A model on the ranks' devices, sharded where there are several.

    Args:
        source: its architecture.
        outside: tensors that belong to no block, by their full names; a tied head may be left out.
        fill: (number, block without weights) -> the block with its weights.
        how: ranks and dtypes.
        recomputes: whether blocks keep their inputs alone for the backward pass.

    Raises:
        ModelError: a tensor outside the blocks is missing.
    """
    model = source.skeleton()
    model.load_state_dict(outside, strict=False, assign=True)
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta and not n.startswith(f"{source.architecture.blocks}.")]
    if missing:
        raise ModelError(f"MODEL: {source.directory} lacks {', '.join(missing[:5])}.")
    return spread(model, source, fill, how, recomputes=recomputes)


def spread(
    model: nn.Module,
    source: ModelSource,
    fill: Callable[[int, nn.Module], nn.Module],
    how: Computation,
    *,
    recomputes: bool = False,
) -> nn.Module:
    """Bring a model, whose blocks may lack their weights, to the ranks' devices, in place; arguments as in :func:`assemble`."""
    sharding, device = how.sharding, how.ranks.device
    blocks = model.get_submodule(source.architecture.blocks)
    for index in range(source.num_blocks):
        block = fill(index, blocks[index]).to(device)
        if recomputes:
            recompute_activations(block, checkpoint)
        sharding.shard(block, how.separately)
        blocks[index] = block
    for name, module in model.named_modules():
        if name != source.architecture.blocks and not name.startswith(f"{source.architecture.blocks}."):
            _move(module, device)
    model.tie_weights()
    sharding.shard(model)
    return model


def _move(module: nn.Module, device: torch.device) -> None:
    """A module's own tensors to a device, not those of the modules inside."""
    for name, parameter in module.named_parameters(recurse=False):
        module.register_parameter(name, nn.Parameter(parameter.data.to(device), requires_grad=parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
