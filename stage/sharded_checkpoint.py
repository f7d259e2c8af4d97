"""A training checkpoint that every process writes its part of: a folder, by torch.distributed.checkpoint.

    record.pt     everything that is not sliced, as `stage.training_checkpoint` says, and `parts`: the other files,
                  each with its size in bytes
    weights/      slices of what is trained, in safetensors files of each process, by the name in `state_dict`
    optimizer/    slices of the optimizer's state, by number of the optimizer, of the parameter, and name of the value

torch's own format comes with a pickle, `.metadata`, in which code can hide; its safetensors files say themselves which
slice they hold. They are read into any number of processes, or put together whole, tensor by tensor.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor

from stage.ranks import Ranks
from stage.whole_files import save, sync

RECORD, WEIGHTS, OPTIMIZER = "record.pt", "weights", "optimizer"
FILE_BYTES = (
    4 << 30
)  # of whole tensors whose slices share a file: a process copies its part of them to write it


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of this kind."""
    return (path / RECORD).is_file()


def write_sharded(checkpoint: Mapping[str, Any], path: Path, ranks: Ranks) -> None:
    """Write a checkpoint whose slices are DTensors as the folder `path`, which must not exist. All processes call it.

    The folder has another name until every part is on the disk: a kill or a full disk leaves none of this name.

    Raises OSError on all processes where one cannot write its part.
    """
    temporary = path.with_name(f".{path.name}.parts")
    with ranks.together():
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    try:
        with ranks.together():
            record, slices = split(checkpoint)
            for part, tensors in slices.items():
                _write_part(temporary / part, tensors, ranks)
        _complete(temporary, record, path, ranks)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, DTensor]]]:
    """What the first process records of a checkpoint, and the slices of its parts by name."""
    weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, DTensor)}
    moments: dict[str, DTensor] = {}
    optimizers = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        plain: dict[int, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            plain[index] = {name: value for name, value in state.items() if not isinstance(value, DTensor)}
            moments |= {f"{number}.{index}.{n}": v for n, v in state.items() if isinstance(v, DTensor)}
        optimizers.append({**optimizer, "state": plain})
    rest = {name: value for name, value in checkpoint["state_dict"].items() if name not in weights}
    record = {**checkpoint, "state_dict": rest, "optimizer_states": optimizers}
    return record, {WEIGHTS: weights, OPTIMIZER: moments}


def _write_part(folder: Path, tensors: dict[str, DTensor], ranks: Ranks) -> None:
    """Each process writes its slices. An error of one is an error of all."""
    if not tensors:
        return
    files = numbered(tensors)
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    writer.per_thread_copy_ahead = 0  # else it waits for all that training has asked of the GPU, every 10 MB
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.everyone)
    except CheckpointException as error:
        rank, reason = _first(error)
        raise OSError(
            f"process {rank} cannot write its part of a checkpoint: {reason}. Make room; the former is kept."
        ) from error


def numbered(tensors: Mapping[str, DTensor]) -> dict[str, int]:
    """The number of each tensor's file; what the first process says counts.

    A file takes no memory twice, as of tied weights, which safetensors refuses.
    """
    number, size = 1, 0
    files: dict[str, int] = {}
    held: set[int] = set()
    for name, tensor in tensors.items():
        memory = tensor.to_local().data_ptr()
        if size >= FILE_BYTES or memory in held:
            number, size, held = number + 1, 0, set()
        files[name] = number
        size += tensor.numel() * tensor.element_size()
        held.add(memory)
    return files


def _complete(temporary: Path, record: Mapping[str, Any], path: Path, ranks: Ranks) -> None:
    """Once all parts are on the disk and seen by the first process: the record, and the name."""
    with ranks.together():
        mine = {}
        for file in sorted(temporary.glob(f"*/shard-{ranks.rank + 1:05d}-*")):
            sync(file)
            mine[file.relative_to(temporary).as_posix()] = file.stat().st_size
    found = ranks.gathered(mine)
    with ranks.together():
        if ranks.first:
            parts = {name: size for part in found for name, size in part.items()}
            check_parts(temporary, parts)
            save({**record, "parts": parts}, temporary / RECORD)
            for inner in (temporary / RECORD, temporary / WEIGHTS, temporary / OPTIMIZER, temporary):
                sync(inner)
            temporary.rename(path)
            sync(path.parent)


def check_parts(folder: Path, parts: Mapping[str, int]) -> None:
    """Raise ValueError unless each file is there and of its size."""
    for name, size in parts.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            came = "it is not there" if found is None else f"it has {found}"
            raise ValueError(
                f"{file} must have {size} bytes, {came}; every process writes its part into one folder, on a disk that "
                "all machines see"
            )


def read_sharded(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder: its record, and mappings that read whole tensors when they are asked for.

    Raises ValueError, with the reason alone, where it is damaged.
    """
    try:
        record = torch.load(folder / RECORD, map_location="cpu", weights_only=True)
        check_parts(folder, record["parts"])
        weights, moments = Parts(folder / WEIGHTS), Parts(folder / OPTIMIZER)
        optimizers = [
            {**saved, "state": Moments(saved["state"], moments, number)}
            for number, saved in enumerate(record["optimizer_states"])
        ]
        return {**record, "state_dict": Joined(record["state_dict"], weights), "optimizer_states": optimizers}
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as e:
        raise ValueError(" ".join(str(e).split())) from e


class Parts(HuggingFaceStorageReader):
    """The slices in a folder, which knows after one look which file holds what."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self.known: Metadata = super().read_metadata() if folder.is_dir() else Metadata({}, storage_data={})

    def read_metadata(self) -> Metadata:
        return self.known

    @property
    def names(self) -> set[str]:
        return set(self.known.state_dict_metadata)

    def dtype(self, name: str) -> torch.dtype:
        found: Any = self.known.state_dict_metadata[name]
        return found.properties.dtype

    def whole(self, name: str) -> Tensor:
        """A tensor put together, in CPU memory."""
        found: Any = self.known.state_dict_metadata[name]
        target = {name: torch.empty(found.size, dtype=found.properties.dtype)}
        self.fill(target, None)
        return target[name]

    def fill(self, targets: dict[str, Tensor], ranks: Ranks | None) -> None:
        """Read tensors in place; of a DTensor each process its slice, and then all call it. None: one alone reads.

        Raises ValueError where a tensor has another shape in the checkpoint, or cannot be read.
        """
        for name, target in targets.items():
            saved: Any = self.known.state_dict_metadata[name]
            if saved.size != target.shape:
                raise ValueError(
                    f"a checkpoint must have the shapes of the model; {name} has {tuple(saved.size)} in {self.folder}, "
                    f"and {tuple(target.shape)} here. Set model as it was."
                )
        group = None if ranks is None else ranks.everyone
        try:
            with quiet():
                dcp.load(targets, storage_reader=self, process_group=group, no_dist=ranks is None)
        except CheckpointException as error:
            rank, reason = _first(error)
            raise ValueError(
                f"process {rank} cannot read checkpoint {self.folder.parent}: {reason}"
            ) from error


class Joined(Mapping[str, Tensor]):
    """Tensors by name: those of the record, and those in parts, which are put together when they are asked for."""

    def __init__(self, plain: Mapping[str, Tensor], parts: Parts) -> None:
        self.plain, self.parts = plain, parts
        self._names = sorted({*plain, *parts.names})

    def __getitem__(self, name: str) -> Tensor:
        return self.plain[name] if name in self.plain else self.parts.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Moments(Mapping[int, dict[str, Any]]):
    """What an optimizer keeps of each parameter, by number, put together when it is asked for."""

    def __init__(self, plain: Mapping[int, dict[str, Any]], parts: Parts, optimizer: int) -> None:
        self.plain, self.parts, self._optimizer = plain, parts, optimizer
        self.sliced: dict[int, dict[str, str]] = {index: {} for index in plain}  # names in `parts`
        for name in sorted(parts.names):
            number, index, value = name.split(".", 2)
            if int(number) == optimizer:
                self.sliced[int(index)][value] = name

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = {value: self.parts.whole(name) for value, name in self.sliced[index].items()}
        return {**self.plain[index], **whole}

    def __iter__(self) -> Iterator[int]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)


def _first(error: CheckpointException) -> tuple[int, str]:
    """The first process that failed, and why, in one line."""
    rank, (reason, _) = min(error.failures.items())
    return rank, " ".join(str(reason).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remark that one process reads alone, which is meant to be so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
