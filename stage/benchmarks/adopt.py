"""Images that another benchmark of the same model has drawn already from the same prompt list: linked, not drawn again.

An image is determined by the settings of its folder and its line of the manifest. Where all of these are the same, the
picture is the same, bytes included: the list gives the padding, the images a prompt give the shape of the batches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from stage.benchmarks.images import MANIFEST, SETTINGS, ImageFolder, Planned, stated, write_atomic

OWN = ("split", "tokens")  # what a benchmark calls a list, and whether it keeps tokens, moves no image


def adopt(folder: ImageFolder, pool: Path, items: Sequence[Planned]) -> int:
    """Link what other folders in `pool` have of the missing images `items`; returns how many there were.

    A damaged picture is left where it is. A benchmark that keeps tokens takes only pictures with theirs.

    Args:
        pool: holds a folder for each benchmark of the model, these a folder for each split.
    """
    wanted = _identity(folder.folder)
    others = [
        path.parent
        for path in sorted(pool.glob(f"*/*/{SETTINGS}"))
        if path.parent != folder.folder and (path.parent / MANIFEST).is_file()
    ]
    alike = [other for other in others if items and _identity(other) == wanted]
    return sum(any(_take(other, folder.folder, item) for other in alike) for item in items)


def _take(source: Path, target: Path, item: Planned) -> bool:
    """Link an image, after its tokens and plan, so that one that exists has the rest."""
    files = [file for file in (item.tokens, item.plan, item.file) if file is not None]
    if not (all((source / file).is_file() for file in files) and _readable(source / item.file)):
        return False
    for file in files:
        _link(source / file, target / file)
    return True


def _readable(picture: Path) -> bool:
    try:
        with Image.open(picture) as opened:
            opened.load()
    except (OSError, SyntaxError):  # Pillow reports a broken PNG as either
        return False
    return True


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy on file systems that have no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        os.link(source, partial)
        os.replace(partial, target)
    except OSError:
        write_atomic(target, source.read_bytes())
    finally:
        partial.unlink(missing_ok=True)  # replacing a link by another to the same file leaves both


def _identity(folder: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]] | None:
    """Settings and manifest without what moves no image; None where they cannot be read."""
    try:
        settings = stated(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
        lines = [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]
        return _images_of(settings), [_images_of(line) for line in lines]
    except (
        OSError,
        ValueError,
        AttributeError,
    ):  # a stranger in the pool; opening that folder itself says what is wrong
        return None


def _images_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in OWN}
