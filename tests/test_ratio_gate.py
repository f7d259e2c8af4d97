"""The gate between sampling and scoring: silent where they agree, an error where they compute different models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stage.group_draws import Stopwatch
from stage.policy.sampler import Sampler
from stage.ratio_gate import RatioGate
from stage.rollout import collect
from stage.types import Rollout
from tests.tiny_training import PROMPTS, Redness, objective, tiny_base, tiny_module, tiny_policy, tiny_trainer

BOUNDS = {"float32": 1e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


def world(base: Path, sampler: Sampler, distribution: str) -> tuple[Any, Rollout]:
    """What the gate sees: policy, sampler and objective, and a rollout of them."""
    module = SimpleNamespace(
        policy=tiny_policy(base), sampler=sampler, objective=objective(beta=0.0, distribution=distribution)
    )
    found = collect(
        module.policy,
        None,
        sampler,
        Redness(),
        module.objective,
        PROMPTS[:2],
        update=0,
        seed=0,
        group_size=3,
        differentiable=False,
        beside=False,
        watch=Stopwatch(torch.device("cpu")),
    )
    return module, found.rollout


@pytest.mark.parametrize(
    ("guidance", "distribution", "shape"),
    [
        (1.0, "conditional", (2, 3, 16)),
        (3.0, "guided", (2, 3, 16)),
        (3.0, "conditional", (1, 2, 16)),
        (1.0, "guided", (2, 3, 16)),
    ],
)
def test_the_same_distribution_is_compared(
    base: Path, guidance: float, distribution: str, shape: tuple[int, ...]
) -> None:
    """Also where the objective scores another: then two samples are replayed under the sampler's."""
    module, rollout = world(base, Sampler(guidance, 1.0), distribution)
    gate = RatioGate(2, BOUNDS)
    assert gate.differences(module, rollout).shape == shape
    metrics = gate.on_rollout(module, rollout)
    assert metrics["policy/ratio_gate_mean"] <= metrics["policy/ratio_gate_max"] < 1e-4
    if shape[0] == 1:  # sampling and scoring do differ, and that is not what the gate is about
        assert (rollout.sampled_logps - rollout.old.logps).abs().mean() > 0.1


@pytest.mark.parametrize("distribution", ["conditional", "guided"])
def test_another_model_stops_training(base: Path, distribution: str) -> None:
    """Tokens drawn before the weights changed: under conditional scoring the gate replays with the new ones."""
    module, rollout = world(base, Sampler(3.0, 1.0), distribution)
    if distribution == "guided":
        rollout.old.logps.add_(0.01)
    else:
        with torch.no_grad():
            module.policy.language_model.norm.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"may differ by 0\.001 nats .* in update 1"):
        RatioGate(2, BOUNDS).on_rollout(module, rollout)
    assert RatioGate(2, {"float32": 100.0}).on_rollout(module, rollout)["policy/ratio_gate_mean"] > 5e-3


def test_not_a_number_is_beyond_every_bound(base: Path) -> None:
    module, rollout = world(base, Sampler(1.0, 1.0), "conditional")
    rollout.sampled_logps[0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="differ by nan"):
        RatioGate(1, BOUNDS).on_rollout(module, rollout)


def test_training_stops_before_it_learns(base: Path, tmp_path: Path) -> None:
    module = tiny_module(base)
    tiny_trainer(tmp_path, [RatioGate(2, BOUNDS)]).fit(module)
    assert module.update == 3 and 0 <= module.latest["policy/ratio_gate_mean"] < 1e-4
    module = tiny_module(base)
    before = {name: parameter.clone() for name, parameter in module.policy.named_parameters()}
    with pytest.raises(RuntimeError, match="scored as they were sampled"):
        tiny_trainer(tmp_path, [RatioGate(2, {"float32": 1e-12})]).fit(module)
    assert all(torch.equal(before[name], parameter) for name, parameter in module.policy.named_parameters())


def test_settings(base: Path) -> None:
    module, rollout = world(base, Sampler(1.0, 1.0), "conditional")
    with pytest.raises(ValueError, match="float32 has none"):
        RatioGate(1, {"bfloat16": 0.5}).on_rollout(module, rollout)
    module.sampler = Sampler(1.0, 0.0)
    assert RatioGate(1, BOUNDS).on_rollout(module, rollout) == {}
    with pytest.raises(ValueError, match="samples must be at least 1"):
        RatioGate(0, BOUNDS)
    with pytest.raises(ValueError, match="bounds must be positive"):
        RatioGate(1, {"float32": 0.0})
