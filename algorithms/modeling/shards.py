"""Writing a checkpoint of any size as safetensors shards, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from algorithms.modeling.files import atomic_write_json

_SHARD_BYTES = 5 * 1000**3
_ALIGNED = 8  # bytes that the length of a safetensors header is a multiple of, so that tensors start at whole words
_COPIED = 1 << 20
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class ShardWriter:
    """Writes tensors as ``model.safetensors``, or as numbered shards with an index where they do not fit one.

    Bytes go to the disk as they come, so that no more than one tensor is held in memory. ``close`` must be called: only then do
    the files bear their final names.
    """

    def __init__(self, directory: Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._header: dict[str, dict[str, object]] = {}  # of the shard that is being written
        self._written = 0
        self._data: BinaryIO | None = None
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors, in order."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._header and self._written + size > self._shard_bytes:
                self._flush()
            if self._data is None:
                self._data = self._part(len(self._shards)).with_suffix(".data").open("w+b")
            # Viewed as bytes: numpy has no bfloat16.
            self._data.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            offsets = [self._written, self._written + size]
            self._header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            self._written += size

    def close(self) -> None:
        """Write the last shard, give all shards their names, and write the index if there are several."""
        if self._header or not self._shards:
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
        """A safetensors file: eight bytes for the header's length, the header, and the bytes of the tensors."""
        part = self._part(len(self._shards))
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNED)
        with part.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            if self._data is not None:
                self._data.seek(0)
                shutil.copyfileobj(self._data, stream, _COPIED)
            stream.flush()
            os.fsync(stream.fileno())
        if self._data is not None:
            self._data.close()
            part.with_suffix(".data").unlink()
        self._shards.append(list(self._header))
        self._total += self._written
        self._header, self._written, self._data = {}, 0, None

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors"
