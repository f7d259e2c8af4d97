"""Objectives beside GRPO and STAGE against float64 loops, alone and with STAGE's weights and entropy reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.types import Rollout, TokenScores
from tests.objective import loop
from tests.objective.example import build, drifted, evaluate, rollout, scores, some_rewards

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}
STAGE = {"reweight_advantage": True, "reweight_kl": True, "entropy_coefficient": 0.4}
PLAIN = {"reweight_advantage": False, "reweight_kl": False, "entropy_coefficient": 0.0}
Term = Callable[[Tensor, list[float], float], list[Tensor]]


def record(kind: str = "discrete", prompts: int = 2, group: int = 4, length: int = 9) -> Rollout:
    return rollout(scores(some_rewards(kind, prompts, group, seed=5)), length=length)


def total_rewards(found: Rollout, prompt: int, on: bool) -> tuple[list[float], list[float]]:
    rewards = loop.task_rewards(found, prompt)
    extra = loop.entropy_rewards(found, prompt, rewards, 0.4) if on else [0.0] * len(rewards)
    return rewards, extra


def without_std(rewards: list[float], extra: list[float], scale: float) -> list[float]:
    """Centred sums, or the centred bonus of a group of equal rewards."""
    tied = max(rewards) - min(rewards) <= 1e-6 * max(1.0, abs(max(rewards)))
    total = extra if tied else [a + b for a, b in zip(rewards, extra, strict=True)]
    return [scale * (value - loop.mean(total)) for value in total]


def clipped(low: float, high: float) -> Term:
    def term(lps: Tensor, olds: list[float], a: float) -> list[Tensor]:
        ratios = [torch.exp(lp - old) for lp, old in zip(lps, olds, strict=True)]
        return [torch.min(r * a, torch.clamp(r, 1 - low, 1 + high) * a) for r in ratios]

    return term


def on_policy(lps: Tensor, olds: list[float], a: float) -> list[Tensor]:
    return [torch.exp(lp - lp.detach()) * a for lp in lps]


def weighted_by_clip(lps: Tensor, olds: list[float], a: float) -> list[Tensor]:
    """CISPO without a lower bound and 1.28 as the upper."""
    return [min(math.exp(lp.item() - old), 1.28) * a * lp for lp, old in zip(lps, olds, strict=True)]


def sequence_token(lps: Tensor, olds: list[float], a: float) -> list[Tensor]:
    """GSPO-token: the value of the sample's ratio, clipped at 3e-4 and 4e-4, with the gradient of each token."""
    whole = math.exp(loop.mean([lp.item() - old for lp, old in zip(lps, olds, strict=True)]))
    ratios = [whole * torch.exp(lp - lp.detach()) for lp in lps]
    return [torch.min(r * a, torch.clamp(r, 1 - 3e-4, 1 + 4e-4) * a) for r in ratios]


def expected_loss(
    found: Rollout,
    logps: Tensor,
    *,
    advantages: Callable[[list[float], list[float]], list[float]],
    term: Term,
    divisor: str,
    beta: float,
    reweight: bool,
    entropy: bool,
) -> Tensor:
    """The mean over groups, or over all tokens of the batch, of weighted policy terms, plus the KL."""
    prompts, group, length = logps.shape
    gains, weights_of, kls = [], [], []
    for p in range(prompts):
        values = advantages(*total_rewards(found, p, entropy))
        similar = loop.similarity(values, found.codes[p].tolist(), self_at_zero=False)
        gain, kl = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        weights = 0.0
        for i in range(group):
            terms = term(logps[p, i], found.old.logps[p, i].tolist(), values[i])
            for t in range(length):
                s = similar[i][t]
                w = loop.clip((1 - s) / 2, 0, 1) if reweight else 1.0
                m = 0.5 + 0.5 * loop.clip(s + 1, 0, 1) if reweight else 1.0
                gain, weights = gain + w * terms[t], weights + w
                assert found.reference is not None
                apart = found.reference.logps[p, i, t].item() - logps[p, i, t]
                kl = kl + m * (torch.exp(apart) - apart - 1)
        gains.append(gain)
        weights_of.append(weights)
        kls.append(kl / (group * length))
    tiny = 1e-6 if reweight else 0.0
    if divisor == "batch":
        # Σ over everything / Σ weights; the divisor of a group is the mean sum of weights, plus epsilon
        policy = -torch.stack(gains).sum() / (prompts * (sum(weights_of) / prompts + tiny))
    elif divisor == "fixed":
        policy = -torch.stack(gains).sum() / (prompts * group * length)
    else:
        means = [g / (w + tiny) for g, w in zip(gains, weights_of, strict=True)]
        policy = -torch.stack(means).mean()
    return policy + beta * torch.stack(kls).mean()


CASES: dict[str, tuple[Any, Term, str]] = {
    "dr_grpo": (lambda r, e: without_std(r, e, 1.0), clipped(0.2, 0.2), "fixed"),
    "dapo": (lambda r, e: loop.advantages(r, e, "raw"), clipped(0.2, 0.28), "batch"),
    "gspo": (lambda r, e: loop.advantages(r, e, "raw"), sequence_token, "group"),
    "cispo": (lambda r, e: loop.advantages(r, e, "raw"), weighted_by_clip, "batch"),
    "rloo": (lambda r, e: without_std(r, e, 4 / 3), on_policy, "group"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("switches", [PLAIN, STAGE], ids=["plain", "with STAGE"])
@pytest.mark.parametrize("kind", ["continuous", "discrete", "equal"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_equals_the_loop(name: str, switches: dict[str, Any], kind: str, beta: float) -> None:
    advantages, term, divisor = CASES[name]
    found = record(kind)
    logps = drifted(found)
    expected = expected_loss(
        found,
        logps,
        advantages=advantages,
        term=term,
        divisor=divisor,
        beta=beta,
        reweight=switches["reweight_kl"],
        entropy=switches["entropy_coefficient"] != 0,
    )
    (gradient,) = torch.autograd.grad(expected, logps)
    value, mine = evaluate(build(name, beta=beta, **switches), found, logps)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(mine, gradient, **EXACT)


def test_gspo_is_the_ratio_of_the_whole_sample() -> None:
    """The paper's eq. 5 differentiated through ρ_i itself: GSPO-token must agree where tokens weigh the same."""
    found = record()
    logps = drifted(found, amount=0.001)  # some samples inside of the bounds, some outside
    objective = build("gspo", beta=0.0)
    values = objective.credit(found)[0].advantages
    terms = []
    for p in range(2):
        for i in range(4):
            ratio = torch.exp((logps[p, i] - found.old.logps[p, i]).mean())
            bounded = ratio.clamp(1 - 3e-4, 1 + 4e-4)
            terms.append(torch.min(ratio * values[p, i], bounded * values[p, i]))
    expected = -torch.stack(terms).mean()
    (gradient,) = torch.autograd.grad(expected, logps)
    value, mine = evaluate(objective, found, logps)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(mine, gradient, **EXACT)
    assert 0 < int((gradient[..., 0] == 0).sum()) < 8  # both cases are there


def test_cispo_keeps_the_gradient_that_a_clip_takes_away() -> None:
    # ρ = e, A > 0: PPO's term is constant there; CISPO's gradient is 1.28 A
    found = rollout(scores([[1.0, 0.0]]), length=1)
    logps = (found.old.logps + 1.0).requires_grad_()
    _, ppo = evaluate(build("dapo"), found, logps)
    _, cispo = evaluate(build("cispo"), found, logps)
    a = build("cispo").credit(found)[0].advantages[0]
    assert ppo[0, 0] == 0
    torch.testing.assert_close(cispo[0, :, 0], -1.28 * a / 2, **EXACT)


def test_leave_one_out_by_hand() -> None:
    # rewards 1, 2, 6: others' means 4, 3.5, 1.5 -> -3, -1.5, 4.5
    credit, _ = build("rloo").credit(rollout(scores([[1.0, 2.0, 6.0]])))
    expected = torch.tensor([[-3.0, -1.5, 4.5]], dtype=torch.float64)
    torch.testing.assert_close(credit.advantages, expected, **EXACT)
    centred, _ = build("dr_grpo").credit(rollout(scores([[1.0, 2.0, 6.0]])))
    torch.testing.assert_close(
        centred.advantages, torch.tensor([[-2.0, -1.0, 3.0]], dtype=torch.float64), **EXACT
    )


@pytest.mark.parametrize("name", ["dr_grpo", "rloo"])
def test_ties_without_a_std(name: str) -> None:
    found = record("equal")
    raw = build(name, entropy_coefficient=0.4).credit(found)[0].advantages
    zero = build(name, entropy_coefficient=0.4, tied_groups="zero").credit(found)[0].advantages
    assert raw.any() and not zero.any()
    with pytest.raises(Exception, match="without a std cannot divide ties"):
        build(name, tied_groups="normalise")


def test_dr_grpo_learns_less_from_tokens_weighted_down() -> None:
    # one group, w = 1/2 everywhere (orthogonal codes): a mean over Σ w is twice a fixed divisor
    found = rollout(scores([[1.0, 0.0]]), length=1, code=2)
    found = Rollout(**{**vars(found), "codes": torch.eye(2)[None, :, None]})
    switches = {**STAGE, "entropy_coefficient": 0.0, "beta": 0.0}
    _, fixed = evaluate(build("dr_grpo", **switches), found, drifted(found, amount=0.0))
    mean = {"_target_": "stage.objective.aggregation.GroupMean", "epsilon": 0.0}
    _, group = evaluate(build("dr_grpo", aggregation=mean, **switches), found, drifted(found, amount=0.0))
    torch.testing.assert_close(group, 2 * fixed, **EXACT)
    assert fixed.any()


def test_a_sequence_ratio_counts_the_tokens_of_a_plan_alone() -> None:
    # differences 0.2 and 0.4 on own tokens, anything in the padding: exp(0.3), not exp(0.6 / 3)
    from stage.objective.ratios import SequenceRatio

    old = torch.zeros(1, 1, 3, dtype=torch.float64)
    plan = TokenScores(
        logps=torch.tensor([[[0.2, 0.4, 9.0]]], dtype=torch.float64),
        entropy=old,
        mask=torch.tensor([[[1, 1, 0]]]),
    )
    found = SequenceRatio()(
        scores=plan, old_logps=old, advantages=torch.ones(1, 1).double(), clip_low=0.2, clip_high=9.0
    )
    torch.testing.assert_close(found.ratio[0, 0, 0].item(), math.exp(0.3), atol=1e-15, rtol=0)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gspo", {"clip_low": None}, "sequence ratio needs"),
    ("cispo", {"clip_high": None}, "clipped weight needs clip_high > 0"),
    ("cispo", {"clip_low": 2.0}, "clipped weight needs clip_high > 0"),
    ("rloo", {"updates_per_rollout": 2}, "on-policy ratio allows one update"),
    ("gcpo", {"critical_tokens.early": 0.9}, "together above 0 and at most 1"),
    ("gcpo", {"critical_tokens.bound": 0.0}, "bound above 0 nats"),
    ("dr_grpo", {"aggregation.length": 0}, "fixed length is a number of tokens"),
    ("dapo", {"resampling_rounds": -1}, "resampling_rounds must be a whole number"),
    ("stage", {"entropy_reward": None}, "slot entropy_reward is needed when entropy_coefficient is 0.4"),
    ("dapo", {"beta_schedule": {"_target_": "builtins.float", "_partial_": True}}, "beta_schedule"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_does_not_fit_raises_at_construction(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        build(name, **changes)
    assert isinstance(caught.value.__cause__, ValueError)
