"""Models sharded over ranks by FSDP2, and tensors that are sharded or not as the case may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from algorithms.parallel.ranks import Ranks


class Sharding:
    """Shards modules over the ranks of a stage; a process alone leaves them whole.

    Args:
        ranks: the processes.
        gathered: dtype in which parameters travel and compute; None for their own.
    """

    def __init__(self, ranks: Ranks, gathered: torch.dtype | None = None) -> None:
        is_alone = ranks.group is None or ranks.size == 1
        self._mesh = None if is_alone else DeviceMesh.from_group(ranks.group, ranks.device.type)
        self._policy = MixedPrecisionPolicy(param_dtype=gathered, cast_forward_inputs=False)

    def shard(self, module: nn.Module, separately: Sequence[str] = ()) -> None:
        """Let the ranks hold a part of every parameter each; modules of the classes ``separately`` are gathered on their own.

        Gradients are summed over ranks, not averaged.
        """
        if self._mesh is None:
            return
        inner = [part for part in module.modules() if part is not module and type(part).__name__ in separately]
        for part in (*inner, module):
            fully_shard(part, mesh=self._mesh, mp_policy=self._policy)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction

    def rows(self, local_rows: Tensor, num_rows: int) -> Tensor:
        """This rank's rows [n, ...] of a tensor [num_rows, ...], as one that knows the whole; split as parameters are."""
        if self._mesh is None:
            return local_rows
        shape = torch.Size((num_rows, *local_rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local_rows, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def set_summing(model: nn.Module, sums: bool) -> None:
    """Whether backward passes sum gradients over the ranks at once, or leave that to a later one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sums, recurse=False)


def reshard(model: nn.Module) -> None:
    """Let go of parameters that are gathered at the moment, so that the model has its sharded ones, and gathers them anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank has to ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype not in (torch.int8, torch.int16):
        return tensor.full_tensor()
    # Not every backend sends short integers.
    wide = DTensor.from_local(
        tensor.to_local().int(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return wide.full_tensor().to(tensor.dtype)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this rank holds of one that is sharded alike."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    chunks = torch.chunk(tensor, mesh.size())
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def recompute_activations(module: nn.Module, checkpoint: Callable[..., Tensor]) -> None:
    """Keep a module's inputs alone for the backward pass, and run it again there."""
    inner = module.forward

    def forward(*args: object, **kwargs: object) -> Tensor:
        """The module's own forward, its activations not kept."""
        return checkpoint(inner, *args, use_reentrant=False, **kwargs)

    module.forward = forward
