"""What each way of storing a pruned model costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from safetensors import safe_open
from torch import Size as Shape

from algorithms.formats.checkpoint import OUTSIDE, Calibrated
from algorithms.formats.pruned.stock import bias_refusal, stock_config
from algorithms.formats.pruned.structure import linear_shapes, structure_of
from algorithms.modeling.transforms.narrowing import Widths

_FLOAT16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class StoredSize:
    """Parameters of a model, their bytes, and the bytes of one token's keys and values in a cache; all in float16."""

    parameters: int
    bytes: int
    cache_bytes: int


def sizes(calibrated: Calibrated, *, multiple: int = 1) -> Mapping[str, StoredSize]:
    """Of the ``original``, and of the pruned model as it is (``ragged``) and ``padded``, where it can be.

    ``multiple`` is what padding rounds the number of neurons up to; see :func:`algorithms.formats.pruned.padded.write_padded`.

    Raises:
        ModelError: a block whose linears do not fit together.
        ValueError: a block is missing.
    """
    source, structure = calibrated.source, structure_of(calibrated, multiple=multiple)
    count, hidden = len(structure.blocks), source.config.hidden_size
    linears = set(source.architecture.linears)
    template = {name: parameter.numel() for name, parameter in source.block_skeleton().named_parameters()}
    around = count * sum(number for name, number in template.items() if name.rpartition(".")[0] not in linears)
    with safe_open(calibrated.directory / OUTSIDE, framework="pt") as handle:
        around += sum(Shape(handle.get_slice(name).get_shape()).numel() for name in handle.keys())  # noqa: SIM118

    def _stored(blocks: Iterable[Widths], biases: Collection[str]) -> StoredSize:
        parameters, cached = around, 0
        for size in blocks:
            shapes = linear_shapes(source.architecture, hidden, size)
            parameters += sum(O * I for O, I in shapes.values()) + sum(shapes[name][0] for name in biases)
            cached += 2 * size.groups * size.head_dim
        return StoredSize(parameters=parameters, bytes=_FLOAT16_BYTES * parameters, cache_bytes=_FLOAT16_BYTES * cached)

    own_biases = [name for name in linears if f"{name}.bias" in template]
    found = {
        "original": _stored([structure.original] * count, own_biases),
        "ragged": _stored(structure.blocks, structure.biases),
    }
    if bias_refusal(source.config, structure.biases) is None:
        found["padded"] = _stored([structure.largest] * count, stock_config(source, structure)[1])
    return found
