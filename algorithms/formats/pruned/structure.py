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
from algorithms.modeling.transforms.narrowing import Widths, attention_output, neuron_output, widths

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
        size = replace(
            original,
            groups=shapes[f"{architecture.qkv[2]}.weight"][0] // original.head_dim,
            neurons=shapes[f"{neuron_output(architecture)}.weight"][1],
        )
        expected = linear_shapes(architecture, source.config.hidden_size, size)
        wrong = [name for name, sides in expected.items() if shapes[f"{name}.weight"] != sides]
        if wrong:
            raise ModelError(f"block {index} of {calibrated.directory}: {', '.join(wrong)} do not fit its other linears")
        blocks.append(size)
        biases |= {name for name in architecture.linears if f"{name}.bias" in shapes}
    return Structure(original=original, blocks=tuple(blocks), biases=frozenset(biases), multiple=multiple)


def linear_shapes(architecture: ModelArchitecture, hidden_size: int, size: Widths) -> dict[str, tuple[int, int]]:
    """Shape [O, I] of every linear of a block of these widths."""
    queries, keys, values = architecture.qkv
    reader = neuron_output(architecture)
    width = size.groups * size.head_dim
    makers = filter(None, (architecture.feeders[reader], architecture.gates.get(reader)))
    return {
        queries: (width * size.heads_a_group, hidden_size),
        keys: (width, hidden_size),
        values: (width, hidden_size),
        attention_output(architecture): (hidden_size, width * size.heads_a_group),
        **dict.fromkeys(makers, (size.neurons, hidden_size)),
        reader: (hidden_size, size.neurons),
    }


def with_biases(tensors: Mapping[str, Tensor], linears: Iterable[str]) -> dict[str, Tensor]:
    """A block's tensors, with a bias of zeros [O] for those of the linears that have none."""
    added = {f"{name}.bias": torch.zeros_like(tensors[f"{name}.weight"][:, 0]) for name in linears}
    return {**added, **tensors}


def padded(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """A block's tensors with the linears' weights, and their biases, grown to shapes [O, I] by rows and columns of zeros.

    Heads and neurons that are added this way compute zeros, and what reads them multiplies these by zeros.
    """
    grown = dict(tensors)
    for name, (O, I) in shapes.items():
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        grown[f"{name}.weight"] = F.pad(weight, (0, I - weight.shape[1], 0, O - weight.shape[0]))
        if bias is not None:
            grown[f"{name}.bias"] = F.pad(bias, (0, O - bias.shape[0]))
    return grown
