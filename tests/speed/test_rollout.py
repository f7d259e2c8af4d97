"""The rollout table: its floor by hand, its baselines against the sampler, the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.policy.janus import JanusPolicy
from stage.speed.__main__ import main
from stage.speed.models import build_policy
from stage.speed.rollout import batch, floor_bytes, gap, generate, plain_loop


@pytest.fixture(scope="module")
def policy() -> JanusPolicy:
    return build_policy("tiny", "cpu", torch.float32)


def test_floor_by_hand(policy: JanusPolicy) -> None:
    """2 layers of 4 x 64² + 3 x 64 x 128 + 2 x 64 numbers, a head of 64² + 64 + 64 x 64 + 64, read 16 times.

    Keys and values of a token: 2 x 2 layers x 64 numbers. 3 images are 6 rows, which read 24, 25, ... 39 tokens.
    """
    weights = 2 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 2 * (64**2 + 64)
    cache = 6 * (2 * 2 * 64) * sum(range(24, 40))
    assert floor_bytes(policy, 3) == 4 * (16 * weights + cache)


def test_the_plain_loop_samples_the_same_distribution(policy: JanusPolicy) -> None:
    prompt, draws = batch(policy, 16)
    assert draws.shape == (2, 8, 16)
    tokens, logps = (part.view(draws.shape) for part in plain_loop(policy, prompt, 16, 99))
    found: dict[str, Any] = dict(gap("x", policy, prompt, tokens, logps, 5.0))
    assert found["x_mean"] <= found["x_p99"] < 1e-4 and logps.std() > 1e-3


def test_generate_stops_early(policy: JanusPolicy) -> None:
    prompt, _ = batch(policy, 8)
    assert generate(policy, prompt, 8, 3).shape == (8, 3)
    assert generate(policy, prompt, 8, 99).shape == (8, 16)


def test_the_command(tmp_path: Path) -> None:
    arguments = "--models tiny --images 8 2 --device cpu --baseline-tokens 2 --output"
    main([*arguments.split(), str(tmp_path / "speed")])
    found = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["model"], row["images"]) for row in found["rollout"]] == [("tiny", 8), ("tiny", 2)]
    row = found["rollout"][0]
    assert row["ratio"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    assert row["tokens_per_second"] == pytest.approx(8 * 16 / row["seconds"])
    assert found["machine"]["torch"] == torch.__version__ and found["checks"][0]["guided_gap_mean"] < 1e-4
    assert "| tiny | 8 |" in (tmp_path / "speed.md").read_text()
