"""A model whose blocks are read when they are about to compute, and forgotten afterwards.

It is an ordinary model to whoever calls it, and needs the memory of one block. A forward of its own reads every block once, so
whoever has many batches should take all of them through a block at a time: :mod:`algorithms.modeling.evaluation.logits` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from algorithms.modeling.source import ModelError, ModelSource

BlockTensors = Callable[[int], Mapping[str, Tensor]]
Fill = Callable[[nn.Module, Mapping[str, Tensor]], None]
_SHELF = "blocks_on_demand"


def fill_block(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block its parameters.

    Raises:
        ModelError: they are not those of the block.
    """
    missing = sorted(name for name, _ in block.named_parameters() if name not in tensors)
    unknown = sorted(tensors.keys() - block.state_dict().keys())
    if missing or unknown:
        raise ModelError(f"weights do not fit the model (missing {missing[:3]}, unknown {unknown[:3]})")
    block.load_state_dict(dict(tensors), strict=False, assign=True)


class Shelf:
    """The blocks of one model, and where their weights come from.

    Args:
        blocks: the model's blocks, parameters on the meta device.
        read: number of a block -> its parameters by their names in the block.
        fill: gives a block the tensors that were read.
    """

    def __init__(self, blocks: nn.ModuleList, read: BlockTensors, fill: Fill) -> None:
        self.blocks = blocks
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.hooks: list[RemovableHandle] = []
        self._read, self._fill = read, fill
        self._taken: set[int] = set()

    def take(self, index: int) -> bool:
        """Give a block its weights; whether it had none.

        Raises:
            ModelError: the weights are not those of the block.
        """
        if index in self._taken:
            return False
        read = self._read(index).items()
        state = {name: tensor.to(self.device, self.dtype if tensor.is_floating_point() else None) for name, tensor in read}
        try:
            self._fill(self.blocks[index], state)
        except ModelError as error:
            raise ModelError(f"block {index}: {error}") from error
        self.blocks[index].requires_grad_(False)
        self._taken.add(index)
        return True

    def put_back(self, index: int) -> None:
        """Forget a block's weights."""
        for module in self.blocks[index].modules():
            for name, parameter in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        self._taken.discard(index)


def on_demand(source: ModelSource, outside: Mapping[str, Tensor], read: BlockTensors, *, fill: Fill = fill_block) -> nn.Module:
    """A model in float32 on the CPU that reads its blocks when they compute.

    Args:
        source: its architecture and configuration.
        outside: tensors that belong to no block, by their full names; a tied head may be left out.
        read: number of a block -> its parameters by their names in the block; they are converted to float32.
        fill: gives a block the tensors that were read; by default these are all that it has, in its own shapes.

    Raises:
        ModelError: a tensor outside the blocks is missing or unknown.
    """
    model, blocks = source.skeleton(), source.architecture.blocks
    real = {name: tensor.float() for name, tensor in outside.items()}
    _, unknown = model.load_state_dict(real, strict=False, assign=True)
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta and not n.startswith(f"{blocks}.")]
    if missing or unknown:
        raise ModelError(f"{source.directory}: weights do not fit the model (missing {missing[:3]}, unknown {unknown[:3]})")
    shelf = Shelf(model.get_submodule(blocks), read, fill)
    for index, block in enumerate(shelf.blocks):
        loaded: list[bool] = []  # what this block's own forward has read; a stack, should a block ever run inside itself
        shelf.hooks.append(block.register_forward_pre_hook(partial(_before, shelf, index, loaded), prepend=True))
        shelf.hooks.append(block.register_forward_hook(partial(_after, shelf, index, loaded), always_call=True))
    vars(model)[_SHELF] = shelf
    return model.eval().requires_grad_(False)


def source_on_demand(source: ModelSource) -> nn.Module:
    """A model as it stands on disk, read block by block.

    Raises:
        ModelError: weights that are missing, or not finite, once they are read.
    """

    def _read(index: int) -> Mapping[str, Tensor]:
        return source.load_block(index).state_dict()

    outside = source.load_outside().state_dict(keep_vars=True)
    prefix = f"{source.architecture.blocks}."
    return on_demand(source, {n: t for n, t in outside.items() if not n.startswith(prefix) and not t.is_meta}, _read)


def folder_on_demand(
    source: ModelSource, decode: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict, *, fill: Fill = fill_block
) -> nn.Module:
    """A folder whose tensors ``decode`` turns into weights, those of one block or those outside the blocks at a time.

    Raises:
        ModelError: missing or unknown tensors.
    """
    prefix = f"{source.architecture.blocks}."

    def _read(index: int) -> Mapping[str, Tensor]:
        start = source.block_prefix(index)
        names = [name for name in source.weight_files if name.startswith(start)]
        return {name.removeprefix(start): tensor for name, tensor in decode(source.tensors(names)).items()}

    outside = [name for name in source.weight_files if not name.startswith(prefix)]
    return on_demand(source, decode(source.tensors(outside)), _read, fill=fill)


def resident(model: nn.Module) -> nn.Module:
    """Any model with all its weights in memory; what reads its blocks on demand reads them now, for good."""
    shelf = vars(model).pop(_SHELF, None)
    if shelf is not None:
        for index in range(len(shelf.blocks)):
            shelf.take(index)
        for hook in shelf.hooks:
            hook.remove()
    return model


def shelf_of(model: nn.Module) -> Shelf | None:
    """The blocks of a model that :func:`on_demand` made; None for any other."""
    return vars(model).get(_SHELF)


@contextmanager
def held(model: nn.Module) -> Iterator[nn.Module]:
    """Within, all weights of a model that reads its blocks on demand are in memory; any other is as it was."""
    shelf = shelf_of(model)
    blocks = range(0 if shelf is None else len(shelf.blocks))
    taken = [index for index in blocks if shelf is not None and shelf.take(index)]
    try:
        yield model
    finally:
        for index in taken:
            shelf.put_back(index)


def place(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """``model.to(device, dtype)``, for any model: blocks on demand get there when they are read."""
    shelf = shelf_of(model)
    if shelf is None:
        return model.to(device, dtype)
    shelf.device, shelf.dtype = device, dtype
    inside = {id(parameter) for parameter in shelf.blocks.parameters()}
    moved: dict[int, nn.Parameter] = {}  # what is tied stays one tensor
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in inside:
                moved.setdefault(id(parameter), nn.Parameter(parameter.to(device, dtype), requires_grad=False))
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def _before(shelf: Shelf, index: int, loaded: list[bool], block: nn.Module, args: object) -> None:
    loaded.append(shelf.take(index))


def _after(shelf: Shelf, index: int, loaded: list[bool], block: nn.Module, args: object, output: object) -> None:
    if loaded and loaded.pop():
        shelf.put_back(index)
