"""Files that are on the disk whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    A kill or a full disk in the middle leaves the former file whole. The temporary file lies in the same
    folder, since a rename is atomic only within one file system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save(content: Mapping[str, Any], path: Path) -> None:
    """torch.save, whole or not at all (`atomic_write`).

    Raises OSError with the system's reason where `path` cannot be written; torch's own error hides it behind positions
    in a stream, so it writes into a file of Python's.
    """
    try:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        if reason is None:
            raise
        raise OSError(
            f"{path} could not be written ({reason.strerror or reason}). Make room; what was saved before is whole."
        ) from error


def sync(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk; a folder that is not there has none."""
    if path.exists():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
