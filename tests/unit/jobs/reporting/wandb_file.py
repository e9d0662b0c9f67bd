"""Reads what wandb leaves on disk without a network: records in LevelDB's log format, each a protocol buffer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7  # bytes; of a record's piece: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> Iterator[object]:
    """The records of a ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, pending = file.read_bytes(), HEADER, b""  # the file's own header is as long as a piece's
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            break
        pending += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


def history(file: Path) -> list[dict[str, object]]:
    """The lines that were logged; nested names are joined by dots."""
    found = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def run_record(file: Path) -> object:
    """What the file says of the run itself."""
    return next(record.run for record in records(file) if record.WhichOneof("record_type") == "run")
