"""Where an input lies, at a plain path or inside an installed Python package, and what it is by its hash."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

PACKAGE = "package://"


def resolve(path: str | Path) -> Path:
    """The file or folder that `path` names.

    `package://stage/shapes/assets/train.jsonl` is looked up in the package `stage`, so a configuration that
    names it works from any directory and once installed. Anything else is an ordinary path (`~` is expanded,
    a relative one starts at the current directory), which need not exist.

    Raises:
        ValueError: what follows `package://` is not `package/inner/path`.
        FileNotFoundError: the package cannot be imported or holds no such path.
    """
    if not str(path).startswith(PACKAGE):
        return Path(path).expanduser()
    package, *inner = str(path)[len(PACKAGE) :].split("/")
    if not inner or not package.isidentifier() or any(step in ("", ".", "..") for step in inner):
        raise ValueError(
            f"a package path is {PACKAGE}<package>/<path inside it> without empty or dotted steps, got "
            f"{path!r}; write it like {PACKAGE}stage/shapes/assets/train.jsonl"
        )
    try:
        target = files(package).joinpath(*inner)
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"a package path starts with a package that can be imported, got {path!r}; install {package!r} "
            f"or give an ordinary path"
        ) from error
    if not isinstance(target, Path) or not target.exists():
        raise FileNotFoundError(
            f"{path!r} must exist in the installed package, looked for {target}; check the spelling, and "
            f"that the package was installed with its data"
        )
    return target


def sha256(file: Path) -> str:
    """Of the content of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
