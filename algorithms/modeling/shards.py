"""Writing a checkpoint of any size as safetensors shards, one piece at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from algorithms.modeling.files import atomic_save_tensors, atomic_write_json

_SHARD_BYTES = 5 * 1000**3


class ShardWriter:
    """Collects tensors and writes them as ``model.safetensors``, or as numbered shards with an index where they do not fit one.

    No more than one shard is held in memory. ``close`` must be called: only then do the files bear their final names.
    """

    def __init__(self, directory: Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors, in order; a full shard is written at once."""
        for name, tensor in tensors.items():
            if self._pending and _bytes(self._pending) + _bytes({name: tensor}) > self._shard_bytes:
                self._flush()
            self._pending[name] = tensor

    def close(self) -> None:
        """Write the last shard, give all shards their names, and write the index if there are several."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).replace(self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).replace(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        atomic_write_json(self._directory / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        atomic_save_tensors(self._part(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._total += _bytes(self._pending)
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
