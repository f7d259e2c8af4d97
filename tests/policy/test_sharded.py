"""Layers that stay whole between forward and backward, and no longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from stage.policy.sharded import shard
from tests.policy.conftest import PROMPTS, load
from tests.policy.tiny_model import build_tiny_janus
from tests.processes import run
from tests.tiny_training import FROZEN


def whole_layers(policy: Any) -> list[bool]:
    """Which layers have weights that are not sliced."""
    return [
        not any(isinstance(weight, DTensor) for weight in layer.parameters())
        for layer in policy.language_model.layers
    ]


def _score(base: Path, reshard: bool) -> dict[str, Any]:
    """Which layers are whole after a pass without gradient, one with it, and its backward pass.

    And how far log-probabilities are from those of the policy before it was sliced, before and after a step.
    """
    dist.init_process_group("gloo")
    policy: Any = load(base, FROZEN)
    prompt = policy.tokenize(PROMPTS[:2])
    tokens = torch.arange(2 * policy.num_image_tokens).view(2, 1, -1) % policy.codebook_size
    expected, moved = load(base, FROZEN), load(base, FROZEN)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shard(policy, mesh, torch.float32, offload=False, reshard_after_forward=reshard)

    def gap(other: Any) -> float:
        with torch.no_grad():
            mine, its = (
                p.score(prompt, tokens, guidance_scale=1.0, temperature=1.0) for p in (policy, other)
            )
        return float((mine.logps - its.logps).abs().max())

    found: dict[str, Any] = {"before": gap(expected), "without gradient": whole_layers(policy)}
    scores = policy.score(prompt, tokens, guidance_scale=1.0, temperature=1.0)
    found["forward"] = whole_layers(policy)
    scores.logps.sum().backward()
    found["backward"] = whole_layers(policy)
    gap(expected)  # nobody runs backward after it
    policy.reshard()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    return found | {"after": gap(moved)}


@pytest.mark.parametrize("reshard", [True, False])
def test_layers_are_whole_from_forward_to_backward(tmp_path: Path, reshard: bool) -> None:
    """A pass without gradient leaves none of them whole: the next would still read the weights from before a step."""
    for found in run(2, tmp_path / "results", _score, build_tiny_janus(tmp_path), reshard):
        assert found["forward"] and all(kept is not reshard for kept in found["forward"])
        assert not any(found["without gradient"]) and not any(found["backward"])
        assert found["before"] < 1e-5 and found["after"] < 1e-5
