"""The file of an offline run: frames by hand, and a run that wandb itself wrote."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from stage.report.sources import read_sources
from stage.report.wandb_log import BLOCK, MAGIC, read_wandb_file, records

FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def fragment(kind: int, body: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + body), len(body), kind) + body


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(MAGIC + b"\0" + b"".join(parts))
    return path


def test_records_of_one_fragment_and_of_several(tmp_path: Path) -> None:
    parts = (fragment(FULL, b"one"), fragment(FIRST, b"t"), fragment(MIDDLE, b"w"), fragment(LAST, b"o"))
    assert list(records(write(tmp_path / "a.wandb", *parts))) == [b"one", b"two"]


def test_a_record_goes_on_in_the_next_block(tmp_path: Path) -> None:
    """Seven bytes of file header, seven of the fragment: the first block holds BLOCK - 14 bytes of the record."""
    long = bytes(range(256)) * 200
    first = long[: BLOCK - 14]
    path = write(tmp_path / "a.wandb", fragment(FIRST, first), fragment(LAST, long[len(first) :]))
    assert list(records(path)) == [long]


def test_the_end_of_a_block_that_has_no_room_for_a_header_is_zeros(tmp_path: Path) -> None:
    body = b"x" * (BLOCK - 14 - 5)
    path = write(tmp_path / "a.wandb", fragment(FULL, body), bytes(5), fragment(FULL, b"next"))
    assert list(records(path)) == [body, b"next"]


def test_a_run_that_was_killed_ends_in_the_middle_of_a_record(tmp_path: Path) -> None:
    for left in (1, 6, 8):
        path = write(tmp_path / "a.wandb", fragment(FULL, b"whole"), fragment(FULL, b"half")[:left])
        assert list(records(path)) == [b"whole"]


def test_what_is_no_file_of_wandb_or_damaged_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "b.wandb"
    other.write_bytes(b"something else")
    with pytest.raises(ValueError, match="was not written by wandb"):
        list(records(other))
    damaged = bytearray(fragment(FULL, b"record"))
    damaged[-1] ^= 1
    with pytest.raises(ValueError, match="is damaged at byte 7"):
        list(records(write(tmp_path / "a.wandb", bytes(damaged))))


def test_a_run_that_wandb_wrote(tmp_path: Path) -> None:
    """Nested settings, nested names of metrics, NaN, and the update as the logger names it."""
    import wandb

    config = {"seed": 3, "algorithm": {"beta": 0.01, "clip_low": None}, "code": {"sha256": "ab" * 32}}
    run = wandb.init(mode="offline", dir=tmp_path, project="stage", name="mine", config=config)
    run.log({"reward/mean": 0.5, "trainer/global_step": 1})
    run.log({"reward/mean": float("nan"), "policy/kl": 1e-7, "trainer/global_step": 2})
    run.log({"reward/mean": 0.75, "trainer/global_step": 3})
    run.finish()
    file = next(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    found = read_wandb_file(file)
    assert found.name == "mine" and found.config == config
    assert [row.get("trainer/global_step") for row in found.history] == [1, 2, 3]
    for source in (file, file.parent, tmp_path / "wandb"):
        (read,), clashes = read_sources([str(source)])
        assert read.name == "mine" and not clashes
        assert read.config == {"seed": 3, "algorithm": config["algorithm"]}
        assert read.curves["reward/mean"].x.tolist() == [1, 3]
        assert read.curves["reward/mean"].y.tolist() == [0.5, 0.75]
        assert read.curves["policy/kl"].y.tolist() == [1e-7]
        assert read.not_finite == ("reward/mean", 2)
        assert [version["sha256"] for version in read.code] == ["ab" * 32]
