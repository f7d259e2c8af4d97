"""Where an input lies: at a plain path, inside an installed Python package, or in a repository of a model hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

PACKAGE = "package://"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # `owner/name` on huggingface.co
HUB_SECONDS = 10.0  # that the hub has to say whether it has a repository
# Weights, configurations and tokenizers; pictures, code and the state of optimizers stay where they are.
WANTED = ("*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer.model", "*.jinja")


def quoted_arguments(given: Sequence[str]) -> list[str]:
    """A command line on which `key=PATH` is quoted for Hydra where an existing PATH has a `=` in it.

    Jobs of a sweep lie in folders such as `algorithm=grpo,seed=1`, which Hydra's grammar refuses as a plain value.
    """
    found = []
    for word in given:
        key, _, value = word.partition("=")
        found.append(f"{key}={quoted(value)}" if "=" in value and _exists(value) else word)
    return found


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError):  # no name of a file: too long, or of an unknown user
        return False


def quoted(text: str) -> str:
    """A string as Hydra's grammar reads it, whatever is in it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


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


def model_folder(path: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The local folder of a model: a folder, a `package://` path, or a hub repository, which is downloaded once.

    Args:
        path: an existing folder counts before a repository of that name.
        revision: branch, tag or commit of a repository; None is its main branch.
        subfolder: folder inside of the other one.

    Raises FileNotFoundError where there is no such folder, or where the repository can neither be reached nor found
    among earlier downloads.
    """
    folder = resolve(path)
    if not folder.is_dir():
        if not REPOSITORY.fullmatch(str(path)):
            raise FileNotFoundError(
                f"a model must be a local folder or a hub repository owner/name; {folder} "
                f"{'is a file' if folder.is_file() else 'does not exist'}. Correct model.path."
            )
        folder = _download(str(path), revision, subfolder)
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"a model must be an existing folder; {folder} does not exist. Correct model.path or model.subfolder."
        )
    return folder


def configured_folder(model: Mapping[str, Any]) -> Path:
    """`model_folder` of a model's configuration: its `path`, `revision` and `subfolder`."""
    return model_folder(str(model["path"]), model.get("revision"), model.get("subfolder"))


def _download(repository: str, revision: str | None, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    # A subfolder may lean on configuration and tokenizer files at the top of its repository.
    wanted = [inside + pattern for pattern in WANTED] + (["*.json"] if inside else [])
    silent = why_the_hub_is_silent(repository, revision)
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=wanted, local_files_only=silent is not None
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        told = silent or error
        reason = f"{type(told).__name__}, {' '.join(str(told).split())[:200]}"
        raise FileNotFoundError(
            f"{repository} is no local folder, and could not be downloaded from the hub either: {reason}. Connect to "
            "the network once, or download the repository elsewhere and set model.path to its folder."
        ) from told


def why_the_hub_is_silent(repository: str, revision: str | None) -> Exception | None:
    """What keeps the hub from answering about a repository; None where it answers.

    Asked once, for ten seconds at most: downloads ask again and again, for minutes where a network swallows requests.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().repo_info(repository, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:  # of kinds that change with the hub's client and its settings
        return error
    return None


def sha256(file: Path) -> str:
    """Of the content of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
