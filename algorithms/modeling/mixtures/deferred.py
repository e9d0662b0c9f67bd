"""Linears of experts whose weights are read when an expert computes, and forgotten when the next one does.

A block of a mixture can be larger than the memory. Its experts then have their weights on the meta device and, for each linear,
a reader: from the model's files before it is compressed, from its codes afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from algorithms.modeling.mixtures.experts import READER, Experts, forget

Reader = Callable[[], Tensor]


def defer(linear: nn.Linear, read: Reader) -> None:
    """Let ``read`` give a linear's weight, [O, I] in float32 on the device, whenever it is on the meta device."""
    vars(linear)[READER] = read


def defer_experts(block: nn.Module, reader_of: Callable[[str], Reader]) -> None:
    """Let ``reader_of`` its name in the block read the weight of every expert's linear, each on the meta device now."""
    for path, mixture in mixtures(block).items():
        mixture.is_deferred = True
        for name, module in mixture.named_modules():
            if isinstance(module, nn.Linear):
                defer(module, reader_of(f"{path}.{name}"))


def mixtures(block: nn.Module) -> dict[str, Experts]:
    """The mixtures of a block by their paths."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Experts)}


def is_deferred(block: nn.Module) -> bool:
    """Whether weights of a block are read when they are needed."""
    return any(mixture.is_deferred for mixture in mixtures(block).values())


def take(block: nn.Module, name: str) -> None:
    """Have the weights of the expert that a linear of the block belongs to; nothing for any other linear."""
    module = block
    for part in name.split("."):
        if isinstance(module, Experts):
            module.take(int(part))
            return
        module = module.get_submodule(part)


def hold_all(block: nn.Module) -> None:
    """Read every weight of a block, for good."""
    for mixture in mixtures(block).values():
        mixture.is_deferred = False
    for module in block.modules():
        read = vars(module).pop(READER, None)
        if read is not None and module.weight.is_meta:
            module.weight = nn.Parameter(read(), requires_grad=False)


@torch.no_grad()
def change_weight(linear: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
    """Put ``change`` of a linear's weight in its place, now or whenever it is read."""
    read = vars(linear).get(READER)
    if read is None:
        linear.weight.copy_(change(linear.weight))
        return
    defer(linear, lambda: change(read()))
    forget(linear)


def restore(
    block: nn.Module, tensors: Mapping[str, Tensor], decode: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> None:
    """Give a block what is stored of it; where its experts are deferred, they are decoded when they compute.

    Args:
        block: of plain linears.
        tensors: all stored tensors, named relative to the block.
        decode: makes parameters of the stored tensors of some of its linears.
    """
    deferred = {
        f"{path}.{name}"
        for path, mixture in mixtures(block).items()
        for name, module in mixture.named_modules()
        if mixture.is_deferred and isinstance(module, nn.Linear)
    }
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in deferred}
    others = {}
    for name, tensor in tensors.items():
        owner = next((name[:end] for end in _dots(name) if name[:end] in deferred), None)
        (others if owner is None else parts[owner])[name] = tensor
    _, unknown = block.load_state_dict(dict(decode(others)), strict=not deferred, assign=True)
    assert not unknown, f"stored tensors that no parameter takes: {unknown[:3]}"
    for name, part in parts.items():
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        defer(linear, _decoder(decode, part, f"{name}.weight"))
        forget(linear)


def _decoder(decode: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], part: Mapping[str, Tensor], weight: str) -> Reader:
    return lambda: decode(part)[weight]


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]
