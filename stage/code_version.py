"""Which code a run was made by: the commit where there is one, and always a hash of the program itself."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CODE = "code.json"  # in the folder of a run: its versions, oldest first
PROGRAMS = ("train.py", "evaluate.py")


def code_record(folder: Path) -> dict[str, Any]:
    """`{"commit", "changed", "sha256"}` of the checkout at `folder`, the folder of train.py.

    `sha256` is over names and bytes of the Python files that a run can execute, so that it tells apart what was changed
    without a commit. `commit` and `changed` (whether tracked files differ from it) are None outside of a checkout.
    """
    state = git_state(folder) or {"commit": None, "changed": None}
    return {**state, "sha256": code_sha256(folder)}


def code_sha256(folder: Path) -> str:
    """sha256 over names and bytes of the programs at `folder` and of the Python files of its `stage`."""
    programs = [folder / name for name in PROGRAMS if (folder / name).is_file()]
    files = [*programs, *sorted((folder / "stage").rglob("*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `folder` and whether tracked files were changed; None outside of one."""
    git = shutil.which("git")
    if git is None:
        return None
    commit = _git(git, folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {
        "commit": commit,
        "changed": bool(_git(git, folder, "status", "--porcelain", "--untracked-files=no")),
    }


def continued(
    before: Sequence[Mapping[str, Any]], now: Mapping[str, Any], update: int
) -> list[dict[str, Any]]:
    """The versions a run was made by, oldest first, each with the update `since` which it was.

    Args:
        before: of the run so far, empty for a new one.
        now: the record of the code that goes on.
        update: rollouts done.
    """
    kept = [dict(version) for version in before if version["since"] < update]
    if kept and kept[-1]["sha256"] == now["sha256"]:
        return kept
    return [*kept, {"since": update, **now}]


def _git(git: str, folder: Path, *arguments: str) -> str | None:
    run = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None
