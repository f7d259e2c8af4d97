"""Two processes make the update of one: on recorded tokens number for number, free-running as far as rounding lets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stage.strategy import settings
from tests.equality import Case, fit_cases, largest_gap
from tests.processes import run
from tests.tiny_training import tiny_base

DDP = {"_target_": "stage.strategy.Replicated", "timeout_seconds": 60}
FSDP = {
    "_target_": "stage.strategy.Sharded",
    "timeout_seconds": 60,
    "cpu_offload": False,
    "rollout": "copy",
    "checkpoint": "sharded",
}
BASIC = [
    Case("grpo"),
    Case("stage"),
    Case("stage", micro_batch=2),
    Case("stage", lora=True),
    Case("grpo", lora=True, micro_batch=3),
    Case("stage", prompts=1),
    Case("grpo", prompts=1, micro_batch=1),
    Case("stage", prompts=1, lora=True),
    Case("grpo", dtype="float32"),
    Case("stage", dtype="float32", micro_batch=2),
    Case("stage", dtype="float32", prompts=1),
]
# What looks beyond the samples of a process, and what is written before them.
SPREAD = [
    Case("stage", prompts=1, compared=True, beside=True),
    Case("grpo", prompts=2, slot="advantage/decoupled"),
    Case("stage", slot="token_weights/across_prompts", micro_batch=3),
    Case("dapo", prompts=2, reweighted=True),
    Case("stage", plans=True, recorded=False),
    Case("grpo", plans=True, recorded=False, prompts=1, lora=True, micro_batch=1),
    Case("stage", rounds=2),
    Case("grpo", rounds=3, prompts=2, micro_batch=2),
    Case("stage", rounds=2, prompts=1),
]
CASES = {"basic": BASIC, "spread": SPREAD}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module", params=CASES)
def alone(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Case], list[dict[str, Any]]]:
    """Cases, and what one process makes of each."""
    cases = CASES[request.param]
    return cases, fit_cases(cases, base, tmp_path_factory.mktemp("alone"))


def check(case: Case, one: dict[str, Any], found: dict[str, Any]) -> None:
    """Every number of one process, within 1e-8 in float64 and 1e-5 of loss and gradient norm in float32."""
    bound = 1e-8 if case.dtype == "float64" else 1e-5
    compared = ("loss/total", "policy/gradient_norm") if case.dtype == "float32" else one["rows"][0].keys()
    for row, expected in zip(found["rows"], one["rows"], strict=True):
        assert row.keys() == expected.keys()
        for name in compared:
            assert row[name] == pytest.approx(expected[name], abs=bound, rel=bound), (str(case), name)
    if case.dtype == "float64":
        for gradients, expected in zip(found["gradients"], one["gradients"], strict=True):
            assert largest_gap(gradients, expected) < bound, str(case)
        assert largest_gap(found["weights"], one["weights"]) < bound, str(case)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_make_the_update_of_one(
    base: Path,
    alone: tuple[list[Case], list[dict[str, Any]]],
    tmp_path: Path,
    strategy: dict[str, Any],
) -> None:
    cases, expected = alone
    found = run(2, tmp_path, fit_cases, cases, base, tmp_path / "runs", strategy)
    for rank in found:
        for case, one, result in zip(cases, expected, rank, strict=True):
            check(case, one, result)


FREE = [
    Case("stage", recorded=False, dtype="float32"),
    Case("grpo", lora=True, recorded=False, dtype="float32"),
    Case("grpo", rounds=2, recorded=False, dtype="float32"),
    Case("grpo", plans=True, recorded=False, dtype="float32"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [DDP, FSDP, FSDP | {"rollout": "layers"}], ids=["ddp", "fsdp", "fsdp, layer by layer"]
)
def test_free_running_processes_draw_the_same_tokens(
    base: Path, tmp_path: Path, strategy: dict[str, Any], record_property: Any
) -> None:
    """All of them in the first update, whose weights are the same; later rounding may turn a token."""
    one = fit_cases(FREE, base, tmp_path / "one")
    ranks = run(2, tmp_path, fit_cases, FREE, base, tmp_path / "runs", strategy)
    for case, expected, *found in zip(FREE, one, *ranks, strict=True):
        shares = equal_shares(expected["tokens"], [rank["tokens"] for rank in found])
        record_property(str(case), shares)
        print(f"{case}: equal tokens by update {shares}")
        assert shares[0] == 1.0 and min(shares) > 0.9


def equal_shares(one: list[Any], ranks: list[list[Any]]) -> list[float]:
    """The share of equal tokens of each update; 0 where the prompts differ."""
    shares = []
    for expected, *parts in zip(one, *ranks, strict=True):
        found = {prompt: tokens for part in parts for prompt, tokens in part.items()}
        equal = [
            (found[prompt] == tokens).double().mean()
            for prompt, tokens in expected.items()
            if prompt in found
        ]
        shares.append(float(sum(equal)) / max(len(expected), len(found)))
    return shares


def test_what_processes_compare_of_their_settings() -> None:
    """The first process alone knows the folder that it writes to, and what starts with it."""
    config = {
        "output": "/data/outputs/run",
        "seed": 0,
        "model": {"path": "/data/janus", "freeze": ["lm_head"], "template": {}},
        "logger": {"mode": "offline"},
        "trainer": {
            "default_root_dir": "/data/outputs/run",
            "devices": 2,
            "strategy": {"rollout": "copy"},
        },
        "callbacks": {
            "images": None,
            "checkpoints": {"folder": "/data/outputs/run/checkpoints", "every": 5},
        },
    }
    assert dict(settings(config)) == {
        "seed": 0,
        "model.path": "/data/janus",
        "model.freeze": ["lm_head"],
        "model.template": {},
        "trainer.devices": 2,
        "trainer.strategy.rollout": "copy",
        "callbacks.images": None,
        "callbacks.checkpoints.every": 5,
    }
