"""What a training checkpoint holds, and how it is written and read without surprises.

A checkpoint is Lightning's file of tensors and plain containers (it loads with `weights_only=True`), or the same in a
folder that several processes write (`stage.sharded_checkpoint`), to which `StageModule` adds

    update      rollouts done so far, int
    config      the composed configuration, a plain dict
    overrides   the command line that led to it, a list of strings
    base        {"path", "sha256"} of the weights the policy started from
    random      states of every random number generator
    processes   of several processes the random states of each, a list; absent for one
    reward      class of the scorer and revision and sha256 of its weights (`stage.provenance`); old files lack it

and from which it removes the weights that were never trained: they are those of `base`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import pickle
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stage.checkpoint_folder import others
from stage.sharded_checkpoint import RECORD, WEIGHTS, is_sharded, read_sharded

POLICY = "policy."  # prefix of the policy's entries in `state_dict`
REQUIRED = ("state_dict", "update", "config", "overrides", "base", "random")


def weights_sha256(folder: str | Path) -> str:
    """sha256 over names and bytes of the weight files of a model folder, in the order of their names.

    Those are its safetensors files, or its pytorch_model*.bin where it has none.

    Raises FileNotFoundError when the folder holds neither.
    """
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(
            f"a model folder must hold *.safetensors or pytorch_model*.bin files; {folder} holds none. "
            "Check `model.path`."
        )
    return _digest(files)


def _digest(files: Iterable[Path]) -> str:
    """sha256 over names and bytes of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def read_training_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a training checkpoint, a file or a folder, to CPU memory, so that only what is used is read.

    A file is mapped. Of a folder, `state_dict` and the state of an optimizer are mappings that put whole tensors
    together when they are asked for.

    Raises FileNotFoundError for a missing one and ValueError for one that is damaged or not ours, with the name of the
    latest that can be read beside it.
    """
    path = Path(path)
    if not path.is_file() and not path.is_dir():
        raise FileNotFoundError(f"a checkpoint must be an existing file; {path} is not one. Check the path.")
    inside = [found for found in (path / "last.ckpt", path / "checkpoints" / "last.ckpt") if found.exists()]
    if inside:
        raise ValueError(
            f"a checkpoint must be one of a run; {path} is a folder that holds some. Give {inside[0]}."
        )
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{error} {_another(path)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = (
            read_sharded(path)
            if is_sharded(path)
            else torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        )
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, pickle.UnpicklingError) as error:
        reason = f": {error}" if path.is_dir() else ""
        raise ValueError(f"checkpoint {path} is damaged or not a checkpoint{reason}.") from error
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ValueError(
            f"a training checkpoint must hold {', '.join(REQUIRED)}; {path} lacks {', '.join(missing)}. "
            "Give one that train.py wrote."
        )
    return checkpoint


def _another(path: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    unreadable = []
    for other in others(path):
        try:
            return f"Use another one: {other} holds update {_read(other)['update']}."
        except ValueError:
            unreadable.append(other.name)
    told = f": {', '.join(unreadable)} cannot be read either" if unreadable else ""
    return f"No other one that can be read lies beside it{told}."


def checkpoint_sha256(path: Path) -> str:
    """sha256 of a checkpoint's file, or over the record and the weights, names and bytes, of a folder."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return _digest([path / RECORD, *sorted((path / WEIGHTS).iterdir())])


def check_base(checkpoint: Mapping[str, Any], base: Mapping[str, str]) -> None:
    """Raise ValueError unless the checkpoint was trained from exactly these base weights."""
    source = checkpoint["base"]
    if source["sha256"] != base["sha256"]:
        raise ValueError(
            "a checkpoint holds only trained weights and needs the base it was trained from: "
            f"{source['path']} with sha256 {source['sha256'][:12]}, got {base['path']} with sha256 "
            f"{base['sha256'][:12]}. Set model.path to the original weights."
        )


def trained_names(module: nn.Module) -> set[str]:
    """Names of the entries of `module.state_dict()` that training may change: trainable parameters and
    buffers.
    """
    frozen = {
        name
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    return set(module.state_dict()) - frozen


def load_trained(policy: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put a checkpoint's trained weights into a policy that holds the base weights; call `check_base` before.

    Raises ValueError when the checkpoint trained other parameters than this policy trains.
    """
    saved: Mapping[str, Tensor] = checkpoint["state_dict"]
    names = {name.removeprefix(POLICY): name for name in saved if name.startswith(POLICY)}
    check_names(names.keys(), trained_names(policy))
    for name, key in names.items():  # one by one, so that no more than one of them is in memory
        policy.load_state_dict({name: saved[key]}, strict=False)


def check_names(saved: Any, expected: Any) -> None:
    """Raise ValueError unless both sets of parameter names are the same."""
    missing, surplus = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
    if missing or surplus:
        raise ValueError(
            "a checkpoint must hold exactly the weights that this model trains; "
            f"it lacks {len(missing)} {missing[:1]} and has {len(surplus)} others {surplus[:1]}. "
            "Set model.freeze as it was."
        )


def random_states() -> dict[str, Any]:
    """States of the generators of python, numpy and torch, on the CPU and on every GPU, as plain
    containers.
    """
    state: Any = np.random.get_state(legacy=True)
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undo `random_states`. GPU states are restored only where as many GPUs are present as were saved."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def to_text(states: Mapping[str, Any]) -> str:
    """Random states as text, to be sent to another process."""
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def from_text(text: str) -> dict[str, Any]:
    """Undo `to_text`."""
    found: dict[str, Any] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return found
