"""The file that Weights & Biases writes beside an offline run, read without an account and without wandb's service.

Records are protocol buffers of wandb (`wandb.proto`), framed as in LevelDB's log (google/leveldb,
doc/log_format.md): blocks of 32 KiB, in them fragments with a header of checksum (4 bytes), length (2) and kind (1),
of which a record has one or several. wandb's own header of 7 bytes comes first and its checksum is zlib's. wandb 0.31
has no Python reader of it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC = b":W&B\xe1\xbe"  # a version byte follows
BLOCK = 32768
HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
STEP = "trainer/global_step"  # where Lightning's logger puts the update


@dataclass(frozen=True)
class WandbRun:
    """What a run logged: `history` has one mapping a call of `log`, nested names joined with a slash."""

    name: str
    run_id: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def read_wandb_file(path: Path) -> WandbRun:
    """Read `run-ID.wandb`. A run that was killed has a file that ends in the middle of a record, which is left out.

    Raises ValueError for another kind of file or a damaged one.
    """
    from wandb.proto import wandb_internal_pb2  # here, since it takes a second and few reports need it

    new_record: Any = vars(wandb_internal_pb2)["Record"]  # made at import, which type checkers cannot see
    name, run_id, config, history = "", "", dict[str, Any](), list[dict[str, Any]]()
    for data in records(path):
        record = new_record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name, run_id = record.run.display_name, record.run.run_id
            config |= _items(record.run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item))
    return WandbRun(name, run_id, {k: v for k, v in config.items() if not k.startswith("_")}, history)


def records(path: Path) -> Iterator[bytes]:
    """The bytes of each whole record. Raises ValueError where a checksum is wrong before the end of the file."""
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise ValueError(f"{path} was not written by wandb; give the folder of a run, or a file run-ID.wandb")
    position, record = len(MAGIC) + 1, b""
    while position + HEADER.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER.size:
            position += room  # too little for a header: the rest of a block is filled with zeros
            continue
        checksum, length, kind = HEADER.unpack_from(data, position)
        if kind == 0:
            position += room
            continue
        start, end = position + HEADER.size, position + HEADER.size + length
        if end > len(data):
            return
        if zlib.crc32(data[start:end], zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"{path} is damaged at byte {position}; report on the run's own folder instead")
        record = data[start:end] if kind in (FULL, FIRST) else record + data[start:end]
        if kind in (FULL, LAST):
            yield record
        position = end


def _items(items: Any) -> dict[str, Any]:
    """Names and values of wandb's key-value pairs."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
