"""Parameters gathered together are, bit for bit, those that are gathered one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from stage.policy.flat_gather import FlatGroup, gathered
from stage.policy.rollout_weights import whole
from tests.processes import run

CPU = torch.device("cpu")
# For three processes: equal chunks; a shorter last one; an empty last one; fewer rows than processes.
SHAPES = ((6, 4), (7, 3), (4, 5), (2, 3), (1,), (9,), (5, 2, 3))
TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float32)


def _gather_both_ways() -> dict[str, bool]:
    """Three groups of float32 parameters in mixed types, beside `whole` of each; and how often processes met."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(3)
    tensors = [torch.randn(shape) for shape in SHAPES]
    sliced = [nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)])) for tensor in tensors]
    wanted = [(parameter, TYPES[number % 4]) for number, parameter in enumerate(sliced)]
    plain = nn.Parameter(torch.arange(3.0))
    meetings: list[int] = []
    collective = dist.all_gather_into_tensor

    def counted(*arguments: object, **options: object) -> object:
        meetings.append(1)
        return collective(*arguments, **options)  # type: ignore[arg-type]

    vars(dist)["all_gather_into_tensor"] = counted
    found: dict[str, bool] = {}
    with torch.no_grad():
        groups = [wanted[:3], [(plain, torch.float32)], wanted[3:], wanted[:1]]
        for number, (parts, group) in enumerate(zip(groups, gathered(groups, CPU), strict=True)):
            for parameter, dtype in parts:
                into = torch.full(parameter.shape, 9.0, dtype=dtype)
                same = torch.equal(group.read(parameter), whole(parameter, dtype, CPU))
                group.read(parameter, into)
                found[f"{number} {tuple(parameter.shape)}"] = same and torch.equal(
                    into, group.read(parameter)
                )
                assert torch.equal(
                    into.double(), original(parameter, sliced, tensors, plain).to(dtype).double()
                )
    found["a meeting a group"] = len(meetings) == (3 if dist.get_world_size() > 1 else 0)
    try:
        FlatGroup([(distribute_tensor(tensors[0], mesh, [Replicate()]), torch.float32)])
    except ValueError as error:
        found["another placement is refused"] = "along their first axis" in str(error)
    return found


def original(parameter: Tensor, sliced: list[nn.Parameter], tensors: list[Tensor], plain: Tensor) -> Tensor:
    return next((t for p, t in zip(sliced, tensors, strict=True) if p is parameter), plain)


@pytest.mark.parametrize("world", [1, 3])
def test_uneven_chunks_and_mixed_types(world: int, tmp_path: Path) -> None:
    for found in run(world, tmp_path, _gather_both_ways):
        assert len(found) == 11 and all(found.values()), found
