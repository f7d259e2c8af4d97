"""Memory under slices: what shrinks with the number of processes, and what is never there at once."""

from __future__ import annotations

import pytest
import torch

from stage.memory import FLOAT, SLACK, Reference, Workload, shape_of
from stage.sharded_memory import sharded_parts, sharded_peak, slices_of
from stage.speed.models import build_policy
from stage.speed.training import FROZEN

RUN = Workload(
    images=4,
    micro_batch=4,
    prompt_tokens=24,
    rollout_rows=2,
    scored_rows=1,
    optimizer_bytes=0,
    reference=Reference.COPY,
    checkpointing=True,
    full_attention=False,
)


def parts(processes: int, copied: bool = True, offload: bool = False) -> dict[str, int]:
    policy = build_policy("tiny", "meta", torch.bfloat16)
    policy.freeze(FROZEN)
    slices, shape = slices_of(policy), shape_of(policy)
    counted = slices.replicated + slices.frozen + slices.outside + slices.layer * shape.layers
    assert counted == sum(p.numel() for p in policy.parameters())
    assert shape.trained == slices.outside + slices.layer * shape.layers
    return sharded_parts(shape, slices, RUN, processes, copied=copied, offload=offload)


def test_slices_shrink_with_the_number_of_processes() -> None:
    one, four = parts(1), parts(4)
    assert one["gradients"] == pytest.approx(4 * four["gradients"], abs=4)
    assert one["reference"] == pytest.approx(4 * four["reference"], abs=4)
    assert (
        one["weights"] - one["gradients"] == four["weights"] - four["gradients"]
    )  # what is whole everywhere
    for name in ("gathered for the rollout", "keys and values", "layers in use", "activations"):
        assert one[name] == four[name]
    assert one["gathered for the rollout"] == 2 * one["gradients"] // FLOAT
    assert parts(4, copied=False)["gathered for the rollout"] < four["gathered for the rollout"]
    assert parts(4, offload=True)["gradients"] == 0


def test_the_largest_moment_counts() -> None:
    found = dict.fromkeys(parts(2), 0) | {"weights": 100, "gradients": 7, "activations": 2}
    assert sharded_peak(found) == round(SLACK * 109)
    assert sharded_peak(found | {"gathered for the rollout": 6, "keys and values": 4}) == round(SLACK * 110)
    assert sharded_peak(found | {"gathered for the rollout": 9}) == round(SLACK * 111)
