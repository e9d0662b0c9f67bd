"""What a pruned calibration holds: the widths of its blocks and the biases of its linears.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from algorithms.formats.checkpoint import Calibrated
from algorithms.modeling.architecture import ModelArchitecture
from algorithms.modeling.source import ModelError
from algorithms.modeling.transforms.narrowing import Widths, attention_output, neuron_output, row_parts, widths

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The original's widths, those of every block, and the linears, relative to a block, that have a bias in any block.

    ``multiple`` is that of neurons in a block that all fit into, unless it were then wider than the original.
    """

    original: Widths
    blocks: tuple[Widths, ...]
    biases: frozenset[str]
    multiple: int = 1

    @property
    def largest(self) -> Widths:
        """The most groups of heads and the most neurons of any block, these rounded up to the multiple."""
        most = max(block.neurons for block in self.blocks)
        rounded = -(-most // self.multiple) * self.multiple
        return replace(
            self.original,
            groups=max(block.groups for block in self.blocks),
            neurons=max(most, min(rounded, self.original.neurons)),
        )


def structure_of(calibrated: Calibrated, *, multiple: int = 1) -> Structure:
    """Of a pruned calibration, from the heads of its files; ``multiple`` as in :class:`Structure`.

    Raises:
        ModelError: a block whose linears do not fit together.
        ValueError: a block is missing.
    """
    source = calibrated.source
    architecture = source.architecture
    original = widths(source.block_skeleton(), architecture)
    blocks, biases = [], set()
    for index, shapes in enumerate(calibrated.shapes()):
        size = _size(architecture, original, shapes)
        expected = linear_shapes(architecture, source.config.hidden_size, size)
        wrong = [name for name, sides in expected.items() if shapes[f"{name}.weight"] != sides]
        if wrong:
            raise ModelError(f"block {index} of {calibrated.directory}: {', '.join(wrong)} do not fit its other linears")
        blocks.append(size)
        biases |= {name for name in architecture.linears if f"{name}.bias" in shapes}
    return Structure(original=original, blocks=tuple(blocks), biases=frozenset(biases), multiple=multiple)


def linear_shapes(architecture: ModelArchitecture, hidden_size: int, size: Widths) -> dict[str, tuple[int, int]]:
    """Shape [O, I] of every linear of a block of these widths."""
    return {
        **{name: (sum(rows), hidden_size) for name, rows in row_parts(architecture, size).items()},
        attention_output(architecture): (hidden_size, size.groups * size.heads_a_group * size.head_dim),
        neuron_output(architecture): (hidden_size, size.neurons),
    }


def _size(architecture: ModelArchitecture, original: Widths, shapes: Shapes) -> Widths:
    """The widths of a block whose tensors have these shapes."""
    channels = shapes[f"{attention_output(architecture)}.weight"][1]
    return replace(
        original,
        groups=channels // (original.heads_a_group * original.head_dim),
        neurons=shapes[f"{neuron_output(architecture)}.weight"][1],
    )


def with_biases(tensors: Mapping[str, Tensor], linears: Iterable[str]) -> dict[str, Tensor]:
    """A block's tensors, with a bias of zeros [O] for those of the linears that have none."""
    added = {f"{name}.bias": torch.zeros_like(tensors[f"{name}.weight"][:, 0]) for name in linears}
    return {**added, **tensors}


def padded(tensors: Mapping[str, Tensor], architecture: ModelArchitecture, largest: Widths) -> dict[str, Tensor]:
    """A block's tensors with the linears' weights, and their biases, grown to the largest widths by rows and columns of zeros.

    Heads and neurons that are added this way compute zeros, and what reads them multiplies these by zeros. In a fused linear,
    each part grows for itself.
    """
    size = _size(architecture, largest, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    before, after = (row_parts(architecture, widths_) for widths_ in (size, largest))
    grown = dict(tensors)
    for name, parts in before.items():
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in tensors:
                pieces = zip(tensors[key].split(parts), parts, after[name], strict=True)
                grown[key] = torch.cat([_longer(piece, rows - held) for piece, held, rows in pieces])
    for name, added in (
        (attention_output(architecture), (largest.groups - size.groups) * size.heads_a_group * size.head_dim),
        (neuron_output(architecture), largest.neurons - size.neurons),
    ):
        grown[f"{name}.weight"] = F.pad(tensors[f"{name}.weight"], (0, added))
    return grown


def _longer(tensor: Tensor, rows: int) -> Tensor:
    """A weight [O, I] or bias [O] with so many more rows of zeros."""
    return torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])
