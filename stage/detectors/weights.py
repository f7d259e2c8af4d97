"""Where the weights of a detector or classifier lie, what they are, and what they run on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stage import paths

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Home:
    """Where weights are published: `file`, and the command that fetches it into a folder DIRECTORY."""

    file: str
    download: str


def locate(path: str, revision: str | None, home: Home) -> Path:
    """The file of weights.

    `path` is a file, a folder that holds it under its published name, a package path (see `stage.paths`) or
    `owner/name` of the Hugging Face hub, of which `revision` (branch, tag or commit) is fetched.

    Raises:
        FileNotFoundError: there is nothing at `path`; says what to download and where to put it.
    """
    place = paths.resolve(path)
    if place.is_dir():
        place = place / home.file
    if place.is_file():
        return place
    reason = f"{place} does not exist"
    if not path.startswith((paths.PACKAGE, "/", ".", "~")) and path.count("/") == 1 and not place.suffix:
        try:
            return _from_hub(path, revision, home.file)
        except (OSError, ValueError) as error:
            reason += f", and the hub did not give it: {str(error).splitlines()[0]}"
    raise FileNotFoundError(
        f"weights must be there before the first rollout, looked for {path!r}: {reason}. Run `{home.download}` "
        f"where there is a network, and give the file or DIRECTORY as the path"
    )


def _from_hub(repository: str, revision: str | None, file: str) -> Path:
    from transformers.utils.hub import cached_file

    found = cached_file(repository, file, revision=revision)
    if found is None:
        raise FileNotFoundError(f"{repository} has no {file}")
    return Path(found)


def provenance(file: Path, path: str, revision: str | None) -> dict[str, Any]:
    """What results record of weights: the path as configured, the revision and the sha256 of the file.

    The revision is the commit that the hub gave, where the file came from there.
    """
    parts = file.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else revision
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"path": path, "revision": commit, "sha256": {file.name: digest}}


def placement(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and dtype by their names. Raises ValueError for one that is not to be had."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}; choose one")
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"a detector runs on a device that is there, got {device!r} without CUDA; take cpu")
    return place, DTYPES[dtype]
