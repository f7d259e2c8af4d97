"""Tensors in files: what a checkpoint folder holds, read one tensor at a time, and written into shards.

safetensors and PyTorch's `.bin`, whole or in shards. Opening a folder reads headers and no numbers.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stage.policy.names import Shape

# What a folder can hold, the first that is there counts: one file, or an index of shards.
KINDS = ("model.safetensors", "pytorch_model.bin")
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its shape, its type, and the file."""

    shape: Shape
    dtype: torch.dtype
    file: Path

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights:
    """The tensors of a checkpoint folder by name; `stored` describes all of them, `read` loads one.

    Raises:
        FileNotFoundError: the folder holds no weights, or lacks a shard.
        ValueError: a file is damaged or holds anything but tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self._opened: dict[Path, dict[str, Tensor]] = {}  # of .bin files: tensors mapped from the file
        self.stored = {name: item for file in self.files for name, item in self._header(file)}

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file where the format allows it."""
        file = self.stored[name].file
        if file.suffix == ".bin":
            return self._bin(file)[name]
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)

    def release(self) -> None:
        """Let go of mapped files, whose pages that were read count as memory of this process."""
        self._opened.clear()

    def _header(self, file: Path) -> Iterator[tuple[str, Stored]]:
        if file.suffix == ".bin":
            for name, tensor in self._bin(file).items():
                yield name, Stored(tuple(tensor.shape), tensor.dtype, file)
            return
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    yield name, Stored(tuple(part.get_shape()), _type(file, name, part.get_dtype()), file)
        except SafetensorError as error:
            raise _damaged(file, "safetensors", error) from error

    def _bin(self, file: Path) -> dict[str, Tensor]:
        if file not in self._opened:
            try:  # the format before zip files cannot be mapped
                mapped = zipfile.is_zipfile(file)
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError as error:
                raise _pickled(file, error) from error
            except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
                raise _damaged(file, "PyTorch", error) from error
            if not isinstance(content, dict) or not all(
                isinstance(item, Tensor) for item in content.values()
            ):
                raise ValueError(
                    f"a file of weights must hold named tensors and nothing else; {file} holds other things. "
                    "Save a state_dict."
                )
            self._opened[file] = content
        return self._opened[file]


def weight_files(folder: Path) -> list[Path]:
    """The files that the tensors of a checkpoint folder are in: safetensors before .bin, one file before shards.

    That is the order of transformers' `from_pretrained`.

    Raises FileNotFoundError when there is none, or when a shard is missing, ValueError for an index that is none.
    """
    for kind in KINDS:
        if (folder / kind).is_file():
            return [folder / kind]
        index = folder / f"{kind}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map")
            if not places or not isinstance(places, dict):
                raise ValueError(
                    f"{index} must map tensors to files as weight_map; it does not. Copy it again."
                )
            return [require(folder, name) for name in sorted(set(places.values()))]
    raise FileNotFoundError(
        f"a checkpoint folder must contain {' or '.join(KINDS)}, or the index of their shards; {folder} does not. "
        "Copy the weights there."
    )


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name to tensor names, in their order, each file of at most `limit` bytes if no tensor is larger."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {KINDS[0]: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file; a tensor that is part of another, or shares its memory, is written as its own."""
    own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_tensors(own, file, {"format": "pt"})


def save_tensors(tensors: dict[str, Tensor], file: Path, noted: dict[str, str]) -> None:
    """A safetensors file, whole or not at all, that whoever may read files made here can read.

    Raises OSError where it cannot be written, as on a full disk.
    """
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file(tensors, unfinished, noted)
        unfinished.chmod(mode)  # safetensors makes files that none but their owner may read
        os.replace(unfinished, file)
    except SafetensorError as error:
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(file)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_index(folder: Path, shards: Mapping[str, list[str]], total: int) -> None:
    """The index that says which shard a tensor is in; one file needs none."""
    if len(shards) > 1:
        places = {name: file for file, names in shards.items() for name in names}
        write_json(
            folder / f"{KINDS[0]}.index.json", {"metadata": {"total_size": total}, "weight_map": places}
        )


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError for a file that is not JSON, or holds anything but names and values."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} must be JSON; {file} is not: {error}. Copy it again.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file.name} must map names to values; {file} is a {type(content).__name__}. Copy it again."
        )
    return content


def write_json(file: Path, content: Any) -> None:
    """With two spaces of indentation and a final line break, as transformers writes its files."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require(folder: Path, name: str) -> Path:
    """The file `name` of a folder. Raises FileNotFoundError when it is not there."""
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"a checkpoint folder must contain {name}; {folder} does not. Copy it there.")
    return file


def _type(file: Path, tensor: str, name: str) -> torch.dtype:
    """torch's type of a tensor in a safetensors file, by the name that the format gives it."""
    if name not in _TYPES:
        raise ValueError(
            f"tensors must be of a type of torch, {', '.join(_TYPES)}; {tensor} in {file} is {name}. "
            "Take a checkpoint that is not quantised."
        )
    return _TYPES[name]


def _pickled(file: Path, error: Exception) -> ValueError:
    """For a PyTorch file that is damaged, or that names functions to call: torch then says GLOBAL and which."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    reason = f"it calls for {found[1]}" if found else " ".join(str(error).split())[-200:]
    return ValueError(
        f"a file of weights must hold tensors and nothing else, since reading other objects runs code; {file} was not "
        f"read: {reason}. Take the safetensors of this model, save a state_dict, or, if it is damaged, copy it again."
    )


def _damaged(file: Path, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"weights must be a whole {kind} file; {file} ({file.stat().st_size} bytes) is damaged: {reason}. "
        "Copy or download it again."
    )
