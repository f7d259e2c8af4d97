"""Checkpoints in a folder, from those of one file: real processes slice what is in it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stage.ranks import Ranks, connect
from stage.sharded_checkpoint import write_sharded
from stage.training_checkpoint import read_training_checkpoint
from tests.processes import run


def connected() -> Ranks:
    """The processes that `tests.processes` started."""
    dist.init_process_group("gloo")
    return connect(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 1, timedelta(seconds=30))


def sliced(value: Any) -> Any:
    """Every tensor in plain containers that has a dimension, sliced over all processes."""
    if isinstance(value, dict):
        return {name: sliced(part) for name, part in value.items()}
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    return distribute_tensor(value.clone(), mesh, [Shard(0)], src_data_rank=None)


def slice_here(whole: Path, folder: Path) -> None:
    ranks, found = connected(), read_training_checkpoint(whole)
    optimizers = [{**saved, "state": sliced(saved["state"])} for saved in found.get("optimizer_states", [])]
    found |= {"state_dict": sliced(found["state_dict"]), "optimizer_states": optimizers}
    write_sharded(found, folder, ranks)


def slice_up(whole: Path, folder: Path, scratch: Path, world: int = 2) -> Path:
    """Write what is in the file `whole` as a folder, by `world` processes."""
    run(world, scratch, slice_here, whole, folder)
    return folder
