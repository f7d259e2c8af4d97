"""What reports need of the runs of a pack, in files small enough to carry: settings, curves, scores, a few pictures."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch

from stage.pack.plan import LAST, PackedRun
from stage.pack.thin import thin
from stage.training_checkpoint import read_training_checkpoint

FILES = ("config.yaml", "code.json", "metrics.csv", "reward.json", "packed.json", "console.log")
MEBIBYTE = 2**20
DROPPED = ("optimizer_states", "lr_schedulers", "loops")  # of a checkpoint that is only looked at


def pack_thin(runs: Sequence[PackedRun], file: Path) -> Path:
    """Write what `stage.pack.thin` leaves of the runs; the same runs give the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.open("wb") as stream,
        gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as squeezed,
        tarfile.open(fileobj=squeezed, mode="w") as archive,
    ):
        for run in runs:
            for name, content in thin(run):
                _add(archive, f"{run.name}/{name}", content)
    return file


def pack(
    runs: Sequence[PackedRun], output: Path, file: Path, mebibytes: float, weights: Sequence[str]
) -> list[Path]:
    """Write the archive and, where it grows beyond `mebibytes`, further ones; return their paths.

    Args:
        output: folder of the pack, which names in the archive are relative to.
        weights: names of runs whose trained weights are packed too.

    """
    file.parent.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    waiting = [run for run in runs if run.folder.is_dir()]
    shown = {
        run.variant: run.name for run in reversed(waiting)
    }  # the first run of a variant shows how it began
    while waiting or not written:
        number = len(written) + 1
        part = file if number == 1 else file.with_name(f"{file.name.removesuffix('.tar.gz')}-{number}.tar.gz")
        waiting = _part(part, waiting, output, mebibytes * MEBIBYTE, weights, set(shown.values()))
        written.append(part)
    return written


def check(file: Path, runs: Sequence[PackedRun], weights: Sequence[str]) -> None:
    """Raise ValueError for another suffix, or for weights of a run that is not there."""
    if not file.name.endswith(".tar.gz"):
        raise ValueError(f"archive must end in .tar.gz; got {file}")
    unknown = set(weights) - {run.name for run in runs}
    if unknown:
        raise ValueError(f"archive_weights names runs of the pack; {sorted(unknown)[0]} is none of them")


def unpack(file: Path, output: Path) -> None:
    """Unpack an archive into the folder of a pack. Raises ValueError for a file that is none."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(file, "r:gz") as archive:
            archive.extractall(output, filter="data")  # nothing outside of the folder
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{file} is damaged or no archive of a pack ({error}); bring it over again"
        ) from error


def _part(
    file: Path,
    runs: Sequence[PackedRun],
    output: Path,
    limit: float,
    weights: Sequence[str],
    beginnings: Set[str],
) -> list[PackedRun]:
    """Write runs until the next one might not fit; return those that are left."""
    waiting, largest = list(runs), 0
    with file.open("wb") as stream, tarfile.open(fileobj=stream, mode="w:gz") as archive:
        while waiting and (not largest or stream.tell() + largest <= limit):
            before, run = stream.tell(), waiting.pop(0)
            for member in members(run, run.name in beginnings):
                archive.add(member, member.relative_to(output).as_posix(), recursive=False)
            if run.name in weights and (run.folder / LAST).exists():
                name = (run.folder / LAST).relative_to(output).as_posix()
                _add(archive, name, trained_weights(run.folder / LAST))
            stream.flush()
            largest = max(largest, stream.tell() - before, 1)
    return waiting


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def members(run: PackedRun, beginning: bool) -> Iterator[Path]:
    """The files of a run that reports read: of its pictures the last, and with `beginning` the first."""
    yield from (run.folder / name for name in FILES if (run.folder / name).is_file())
    yield from sorted((run.folder / "evaluation").rglob("results.json"))
    pictures = sorted((run.folder / "images").glob("update_*.png"))
    yield from pictures[-1:]
    yield from pictures[: 1 if beginning else 0][: len(pictures) - 1]


def trained_weights(checkpoint: Path) -> bytes:
    """A checkpoint that can be evaluated and not resumed."""
    kept: dict[str, Any] = {k: v for k, v in read_training_checkpoint(checkpoint).items() if k not in DROPPED}
    kept["state_dict"] = dict(kept["state_dict"])
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()
