"""`algorithm=stage_released` against golden cases of the published arithmetic, and against the loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.types import TokenScores
from tests.objective import loop
from tests.objective.example import build, drifted, rollout, scores

BINARY = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
AT_THE_MEAN = [0.0, 0.5, 1.0, 0.5, 0.5, 1.0, 0.0, 0.5]
FLAT = [0.5] * 8
SPREAD = [0.06, 0.22, 0.23, 0.18, 0.56, 0.11, 0.46, 0.71]
RECIPES = [
    (["geneval"], [SPREAD]),
    (["geneval"], [BINARY]),
    (["geneval"], [AT_THE_MEAN]),
    (["geneval"], [FLAT]),
    (["ocr"], [BINARY]),
    (["ocr"], [FLAT]),
    (["geneval", "hps"], [FLAT, SPREAD]),
    (["geneval", "hps"], [FLAT, FLAT]),
    (["hps", "ocr"], [BINARY, AT_THE_MEAN]),
    (["hps", "git", "gdino"], [SPREAD, BINARY, AT_THE_MEAN]),
    (["hps", "git"], [AT_THE_MEAN, FLAT]),
    (["hps"], [FLAT]),
]


@pytest.mark.parametrize("number", range(6))
def test_golden_cases(number: int, shared: Path) -> None:
    file = shared / "golden" / "released_arithmetic.pt"
    if not file.is_file():
        pytest.skip(f"no golden cases at {file}")
    case = torch.load(file, weights_only=True)[number]
    objective = build(
        "stage_released",
        beta=case["beta"],
        reweight_advantage=case["reweight_advantage"],
        reweight_kl=case["reweight_kl"],
        entropy_coefficient=0.4 if case["entropy_reward"] else 0.0,
    )
    old = TokenScores(case["logps"][None], case["entropy"][None])
    record = replace(
        rollout(scores(case["rewards"][None], case["reward_names"]), length=old.logps.shape[-1]),
        codes=case["codes"][None],
        old=old,
        reference=TokenScores(case["ref_logps"][None], case["ref_entropy"][None]),
    )
    credit, _ = objective.credit(record)
    logps = case["logps"][None].clone().requires_grad_()
    loss, _ = objective.loss(TokenScores(logps, old.entropy), credit)
    (gradient,) = torch.autograd.grad(loss, logps)

    torch.testing.assert_close(credit.advantages[0], case["advantages"], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(loss, case["loss"], atol=0, rtol=1e-8)
    assert (gradient[0] - case["grad"]).norm() <= 1e-8 * case["grad"].norm()
    assert (credit.similarity is None) == (case["similarity"] is None)
    if credit.similarity is not None:
        torch.testing.assert_close(credit.similarity[0], case["similarity"].double(), atol=2e-7, rtol=0)


@pytest.mark.parametrize(("names", "columns"), RECIPES)
@pytest.mark.parametrize(
    "switches",
    [(True, True, 0.4), (True, True, 0.0), (False, True, 0.4), (True, False, 0.0), (False, False, 0.4)],
)
def test_equals_the_loop(
    names: list[str], columns: list[list[float]], switches: tuple[bool, bool, float]
) -> None:
    parts = torch.tensor(columns, dtype=torch.float64).T[None]
    record = rollout(scores(parts, names), length=3)
    changes: dict[str, Any] = dict(
        zip(("reweight_advantage", "reweight_kl", "entropy_coefficient"), switches, strict=True)
    )
    objective = build("stage_released", **changes)
    logps = drifted(record)
    found, similar, expected = loop.released_loss(record, logps, beta=0.03, **changes)
    (gradient,) = torch.autograd.grad(expected, logps)
    credit, _ = objective.credit(record)
    loss, _ = objective.loss(TokenScores(logps, record.old.entropy), credit)
    (ours,) = torch.autograd.grad(loss, logps)

    torch.testing.assert_close(credit.advantages[0], torch.tensor(found).double(), atol=1e-6, rtol=1e-6)
    if credit.similarity is not None:
        torch.testing.assert_close(credit.similarity[0], torch.tensor(similar).double(), atol=2e-7, rtol=0)
    # cosines are float32 in the published code, and the loop has them in float64
    torch.testing.assert_close(loss, expected.detach(), atol=1e-7, rtol=0)
    assert (ours - gradient).norm() <= 1e-6 * gradient.norm()


def test_differs_from_stage_where_it_should() -> None:
    # samples at the mean count themselves, and a flat group has w = 0 and m = 1
    record = rollout(scores(torch.tensor([AT_THE_MEAN]), ["geneval"]))
    ours, _ = build("stage").credit(record)
    released, _ = build("stage_released").credit(record)
    assert ours.similarity is not None and released.similarity is not None
    at_the_mean = torch.tensor([AT_THE_MEAN]) == 0.5
    factor = (released.similarity / ours.similarity)[at_the_mean]
    torch.testing.assert_close(factor, torch.full_like(factor, 7 / 8), atol=0, rtol=1e-5)
    flat, metrics = build("stage_released", entropy_coefficient=0.0).credit(
        rollout(scores(torch.tensor([FLAT]), ["geneval"]))
    )
    assert flat.token_weights is not None and not flat.token_weights.any()
    assert metrics["weights/kl_mean"] == 1.0


def test_the_entropy_reward_acts_in_two_recipes() -> None:
    for name, active in (("geneval", 1.0), ("ocr", 1.0), ("shapes/partial", 1.0), ("hps", 0.0)):
        _, metrics = build("stage_released").credit(rollout(scores(torch.tensor([BINARY]), [name])))
        assert metrics["reward/entropy_active_groups"] == active


def test_more_than_one_prompt_raises() -> None:
    with pytest.raises(ValueError, match="one prompt a rank, got 2"):
        build("stage_released").credit(rollout(scores(torch.rand(2, 8), ["geneval"])))
