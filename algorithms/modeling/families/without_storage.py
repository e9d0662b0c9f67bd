"""Modules in which nothing is stored, and their way to a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class WithoutStorage(TorchFunctionMode):
    """Within, ``torch.empty``, which parameters are made of, gives shapes alone: all experts of a block are its memory.

    Buffers, which are made of values, stay what they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever any function of torch returns
        """See :class:`torch.overrides.TorchFunctionMode`."""
        given = kwargs or {}
        return func(*args, **{**given, "device": "meta"} if func is torch.empty else given)


def move_own(module: nn.Module, device: torch.device | str) -> None:
    """A module's own parameters and buffers to a device, none of its children's."""
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(parameter.to(device), requires_grad=False)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
