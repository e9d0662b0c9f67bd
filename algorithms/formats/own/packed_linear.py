"""The linear that computes from packed tensors of a layout of our own, and the loader of folders of such tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from algorithms.modeling.source import ModelError, ModelSource


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Packed tensors ``P.<part>`` of a linear ``P``.

    ``marker`` is the part by which a packed linear is known, ``parts`` are all there may be, and ``decode`` makes the weight
    [O, I] float32 of those that there are, by part. Each linear has ``P.shape``, which begins with O and I. Where ``is_slow``
    says so of a linear's parts, its weight is decoded once, when it is loaded, and kept.
    """

    marker: str
    parts: Sequence[str]
    decode: Callable[[Mapping[str, Tensor]], Tensor]
    is_slow: Callable[[Mapping[str, Tensor]], bool] = lambda parts: False

    def packed_linears(self, names: Sequence[str]) -> list[str]:
        """The linears that are packed among tensors of these names, sorted."""
        ending = f".{self.marker}"
        return sorted(name.removesuffix(ending) for name in names if name.endswith(ending))

    def of(self, tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The tensors of one linear by the last part of their name."""
        return {part: tensors[f"{prefix}.{part}"] for part in self.parts if f"{prefix}.{part}" in tensors}

    def dense_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict in float32 in which every packed linear has become ``P.weight`` [O, I]."""
        packed = self.packed_linears(list(tensors))
        inside = {f"{prefix}.{part}" for prefix in packed for part in self.parts}
        state = {name: tensor.float() for name, tensor in tensors.items() if name not in inside}
        return state | {f"{prefix}.weight": self.decode(self.of(tensors, prefix)) for prefix in packed}


class PackedLinear(nn.Module):
    """A linear whose buffers are the packed tensors; its weight is decoded at every call, or once where that is slow.

    A change of dtype, as in ``model.to(torch.bfloat16)``, leaves the buffers as they are: their bits are the format.
    """

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        self._layout = layout
        for part, tensor in tensors.items():
            self.register_buffer(part, tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = tensors["shape"][:2].tolist()
        self._kept = layout.decode(tensors) if layout.is_slow(tensors) else None  # no buffer: it is not stored again

    def decoded(self) -> Tensor:
        """The weight [O, I], in float32 or, where it is kept, in what the model was converted to."""
        return self._kept if self._kept is not None else self._layout.decode(dict(self.named_buffers()))

    def forward(self, hidden: Tensor) -> Tensor:
        """Outputs [..., O] of inputs [..., I] of any floating type."""
        weight = self.decoded().to(hidden.dtype)
        return F.linear(hidden, weight, None if self.bias is None else self.bias.to(hidden.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        if self._kept is not None:
            self._kept = fn(self._kept)
        for part, tensor in before.items():
            moved = self.get_buffer(part)
            if moved.dtype != tensor.dtype:
                self._buffers[part] = tensor.to(moved.device)
        return self


def load_packed_by(layout: Layout, folder: Path) -> nn.Module:
    """The model of a folder of packed weights: float32, in evaluation mode, with :class:`PackedLinear` for what is packed.

    Raises:
        ModelError: missing or unknown tensors.
    """
    source = ModelSource(folder)
    model = source.skeleton()
    names = set(source.weight_files)
    inside = set()
    for prefix in layout.packed_linears(list(names)):
        wanted = [f"{prefix}.{part}" for part in layout.parts if f"{prefix}.{part}" in names]
        bias = [f"{prefix}.bias"] if f"{prefix}.bias" in names else []
        tensors = source.tensors(wanted) | source.tensors(bias, torch.float32)
        model.set_submodule(prefix, PackedLinear(layout, layout.of(tensors, prefix), tensors.get(f"{prefix}.bias")))
        inside.update(wanted + bias)
    _, unknown = model.load_state_dict(source.tensors(sorted(names - inside), torch.float32), strict=False, assign=True)
    model.tie_weights()
    absent = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if absent or unknown:
        raise ModelError(f"{folder}: weights do not fit the model (missing {absent[:3]}, unknown {unknown[:3]})")
    return model.eval().requires_grad_(False)
