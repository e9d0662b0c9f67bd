"""A pruned model for stock loaders: every block grown by zeros to the largest widths of any.

A model whose blocks are all equally wide is not padded, but for what makes the number of neurons a multiple of a given number:
that of the columns that later share a scale, or of what a kernel takes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from algorithms.formats.checkpoint import Calibrated, write_checkpoint
from algorithms.formats.pruned.stock import stock_config
from algorithms.formats.pruned.structure import padded, structure_of, with_biases
from algorithms.modeling.on_demand import folder_on_demand
from algorithms.modeling.source import ModelSource


def write_padded(calibrated: Calibrated, directory: Path, *, multiple: int = 1) -> None:
    """A Hugging Face folder that loads without code of its own; its number of neurons is a multiple of ``multiple``.

    Raises:
        ModelError: biases that no stock configuration of the model's kind has; see :func:`bias_refusal`.
    """
    source, structure = calibrated.source, structure_of(calibrated, multiple=multiple)
    settings, biases = stock_config(source, structure)

    def _grown(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return padded(with_biases(tensors, biases), source.architecture, structure.largest)

    write_checkpoint(calibrated, directory, _grown, config=settings)


def read_padded(directory: Path) -> nn.Module:
    """The model of such a folder in float32, read block by block when it computes.

    Raises:
        ModelError: missing or unknown tensors.
    """
    return folder_on_demand(ModelSource(directory))
