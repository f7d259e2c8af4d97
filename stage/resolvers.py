"""What configurations compute: the functions behind `${name:argument}` in conf/."""

from __future__ import annotations

import hashlib
from pathlib import Path

from omegaconf import OmegaConf

from stage import processes

LONGEST_NAME = 200  # bytes of a file name; file systems take 255


def run_folder(resume: str | None, fresh: str) -> str:
    """The folder of the run that the checkpoint `resume` belongs to, or `fresh` for a new run."""
    if resume is not None:
        folder = Path(str(resume)).expanduser().absolute().parent
        if folder.name == "checkpoints" and folder.is_dir():
            return str(folder.parent)
    return fresh


def job_folder(overrides: str) -> str:
    """A folder name for one job of a sweep: its overrides, as far as file systems take them, and then a hash."""
    name = overrides.replace("/", "_") or "defaults"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 4]}-{hashlib.blake2b(overrides.encode(), digest_size=4).hexdigest()}"


def scorers_on(device: str) -> str:
    """Where the scorers of a benchmark run: where the evaluation does, `auto` being the GPU where there is one."""
    if device != "auto":
        return device
    import torch  # not for those who ask for help

    return "cuda" if torch.cuda.is_available() else "cpu"


def register() -> None:
    """Make the names known; whoever composes or reads a configuration does it first."""
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    OmegaConf.register_new_resolver("on", scorers_on, replace=True)
    OmegaConf.register_new_resolver("processes", processes.processes, replace=True)
