"""Which checkpoints a folder holds, and by which names.

A checkpoint is written once, as `update_N.ckpt`. `last.ckpt` and `best.ckpt` are further names of it: of a file, hard
links, so that each of them is a file like any other; of a folder, symbolic links. A name moves to another checkpoint in
one step, and only then is anything removed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

NUMBERED = re.compile(r"update_(\d+)(?:_(\d+))?\.ckpt")
UNLINKED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  # of file systems without hard links
GONE = ".gone"  # ends the name of what is being removed


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: of the folder.
        keep: how many of the last checkpoints stay, `last.ckpt` among them.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.last, self.best = path / "last.ckpt", path / "best.ckpt"

    @property
    def most(self) -> int:
        """Checkpoints that exist at once: the last, the best, and the one being written."""
        return self.keep + 2

    def prepare(self) -> None:
        """Make the folder, and remove what a run that was killed has left half written or half removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".*.ckpt.*"):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()

    def count(self) -> int:
        """Checkpoints that are there, each counted once whatever its names."""
        return len({(s.st_dev, s.st_ino) for s in (p.stat() for p in self.path.glob("*.ckpt") if p.exists())})

    def place(self, update: int) -> Path:
        """A name for the checkpoint of an update that none has: a folder cannot be replaced in one step."""
        found, again = self.path / f"update_{update:08d}.ckpt", 1
        while os.path.lexists(found):
            again += 1
            found = self.path / f"update_{update:08d}_{again}.ckpt"
        return found

    def settle(self, written: Path, update: int, *, best: bool) -> None:
        """Make a whole checkpoint the last and, if it is, the best; then remove those that are too many.

        Where a run was resumed from an earlier checkpoint, what it had saved later, or at the same update, goes too.
        """
        for name in (self.best, self.last) if best else (self.last,):
            link(written, name)
        latest = {number: path for number, path in self.numbered() if number <= update}
        numbered = list(latest.values())
        kept = {*(numbered[-self.keep :] if self.keep > 1 else ()), *self._linked()}
        for _, path in self.numbered():
            if path not in kept:
                remove(path)

    def _linked(self) -> set[Path]:
        return {name.parent / os.readlink(name) for name in (self.last, self.best) if name.is_symlink()}

    def numbered(self) -> list[tuple[int, Path]]:
        """(update, path) of the checkpoints that are named by their update, in the order they were made."""
        found = []
        for path in self.path.glob("update_*.ckpt"):
            if match := NUMBERED.fullmatch(path.name):
                found.append((int(match[1]), int(match[2] or 1), path))
        return [(update, path) for update, _, path in sorted(found)]


def link(written: Path, name: Path) -> None:
    """Give a checkpoint another name in its folder, in one step; a checkpoint that only had this name is gone then."""
    temporary = name.with_name(f".{name.name}.link")
    temporary.unlink(missing_ok=True)
    if written.is_dir():
        os.symlink(written.name, temporary)
    else:
        try:
            os.link(written, temporary)
        except OSError as error:
            if error.errno not in UNLINKED:
                raise
            shutil.copyfile(written, temporary)
    if name.is_dir() and not name.is_symlink():  # a copy of a run in which links became folders
        remove(name)
    os.replace(temporary, name)
    temporary.unlink(missing_ok=True)  # of two names of one file, replacing does nothing


def remove(path: Path) -> None:
    """Remove a checkpoint: its name in one step, then what it holds."""
    if not path.is_dir():
        path.unlink()
        return
    gone = path.with_name(f".{path.name}{GONE}")
    path.rename(gone)
    shutil.rmtree(gone)


def others(path: Path) -> Iterator[Path]:
    """Further checkpoints in the folder of one, the latest first, then the last and the best."""
    folder = CheckpointFolder(path.parent, 1)
    candidates = [*(found for _, found in reversed(folder.numbered())), folder.last, folder.best]
    for candidate in candidates:
        if candidate.exists() and not (path.exists() and candidate.samefile(path)):
            yield candidate
