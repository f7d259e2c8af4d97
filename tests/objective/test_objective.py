"""The whole objective against the loop of `loop.py`, its invariances, and what it does not call."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stage.objective import entropy, similarity
from stage.types import Rollout, TokenScores, map_tensors
from tests.objective import loop
from tests.objective.example import GRPO, build, drifted, evaluate, rollout, scores, some_rewards

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 1e-12}
SWITCHES = [
    (advantage, kl, coefficient)
    for advantage in (False, True)
    for kl in (False, True)
    for coefficient in (0.0, 0.4)
]


def assert_equals_the_loop(name: str, record: Rollout, **changes: Any) -> None:
    """Loss and gradient of `name` with changes, for a policy that has drifted far enough to be clipped."""
    objective = build(name, **changes)
    logps = drifted(record)
    expected = loop.stage_loss(
        record,
        logps,
        reweight_advantage=objective.reweight_advantage,
        reweight_kl=objective.reweight_kl,
        entropy_coefficient=objective.entropy_coefficient,
        beta=objective.beta,
        clip_at=(changes.get("clip_low", 0.2), changes.get("clip_high", 0.2)),
        tied_groups=objective.tied_groups,
    )
    (gradient,) = torch.autograd.grad(expected, logps)
    value, found = evaluate(objective, record, logps)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(found, gradient, **EXACT)


@pytest.mark.parametrize("kind", ["continuous", "discrete", "equal"])
@pytest.mark.parametrize(("prompts", "group"), [(1, 2), (3, 4)])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_grpo_equals_the_loop(kind: str, prompts: int, group: int, beta: float) -> None:
    record = rollout(scores(some_rewards(kind, prompts, group, seed=group)))
    assert_equals_the_loop("grpo", record, beta=beta)


@pytest.mark.parametrize("kind", ["continuous", "discrete", "equal"])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("tied_groups", ["raw", "zero", "normalise"])
def test_stage_equals_the_loop(kind: str, switches: tuple[bool, bool, float], tied_groups: str) -> None:
    record = rollout(scores(some_rewards(kind, 2, 4, seed=5)))
    advantage, kl, coefficient = switches
    changes = {"reweight_advantage": advantage, "reweight_kl": kl, "entropy_coefficient": coefficient}
    assert_equals_the_loop("stage", record, tied_groups=tied_groups, beta=0.1, **changes)


def test_weighted_parts_and_unequal_clipping_equal_the_loop() -> None:
    parts = torch.rand(2, 5, 3, dtype=torch.float64)
    record = rollout(scores(parts, weights=[1.0, 0.3, 0.0]))
    assert_equals_the_loop("stage", record, clip_low=0.1, clip_high=0.3)


def test_several_updates_on_one_rollout_equal_the_loop() -> None:
    record = rollout(scores(some_rewards("discrete", 2, 4, seed=1)))
    objective = build("stage", updates_per_rollout=4, beta=0.1)
    credit, _ = objective.credit(record)
    mine = record.old.logps.clone().requires_grad_()
    theirs = record.old.logps.clone().requires_grad_()
    clipped = []
    for _ in range(4):
        loss, metrics = objective.loss(TokenScores(mine, record.old.entropy), credit)
        expected = loop.stage_loss(
            record,
            theirs,
            reweight_advantage=True,
            reweight_kl=True,
            entropy_coefficient=0.4,
            beta=0.1,
            clip_at=(0.2, 0.2),
        )
        torch.testing.assert_close(loss, expected, **EXACT)
        clipped.append(metrics["policy/clip_fraction"].item())
        for logps, value in ((mine, loss), (theirs, expected)):
            (gradient,) = torch.autograd.grad(value, logps)
            logps.data -= 5.0 * gradient
        torch.testing.assert_close(mine, theirs, **EXACT)
    assert clipped[0] == 0
    assert clipped[-1] > 0.1  # the case does reach the clip


def test_stage_by_hand() -> None:
    # one prompt, rewards 1 and 0, one token each, orthogonal codes: s = 0, w = 1/2, m = 1, std sqrt(1/2) and
    # A = ±0.5 / (std + 1e-4). The policy is that of the rollout: ratio 1. It is the reference too: k3 = 0.
    record = rollout(scores([[1.0, 0.0]]), length=1, code=2)
    record = replace(record, codes=torch.eye(2)[None, :, None], reference=record.old)
    logps = record.old.logps.clone().requires_grad_()
    value, gradient = evaluate(build("stage"), record, logps)
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = 0.5 * advantage / (1 + 1e-6)
    torch.testing.assert_close(value, torch.zeros((), dtype=torch.float64), atol=1e-15, rtol=0)
    wanted = torch.tensor([[[-expected], [expected]]], dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted, atol=1e-15, rtol=0)


def test_everything_off_is_grpo_bit_for_bit() -> None:
    for kind in ("continuous", "discrete"):
        record = rollout(scores(some_rewards(kind, 2, 4, seed=3).float()), dtype=torch.float32)
        logps = drifted(record)
        ours, grpo = evaluate(build("stage", **GRPO), record, logps), evaluate(build("grpo"), record, logps)
        assert ours[0].equal(grpo[0])
        assert ours[1].equal(grpo[1])


def test_everything_off_calls_neither_similarity_nor_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_args: object, **_keywords: object) -> None:
        raise AssertionError("called")

    for module in (similarity, entropy):
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", "") == module.__name__ and name.islower():
                monkeypatch.setattr(module, name, called)
    monkeypatch.setattr(similarity.StageWeights, "__call__", called)
    record = rollout(scores([[1.0, 0.0, 1.0]]))
    evaluate(build("stage", **GRPO), record, drifted(record))
    for changes in ({"reweight_kl": True}, {"reweight_advantage": True}, {"entropy_coefficient": 0.4}):
        with pytest.raises(AssertionError, match="called"):
            evaluate(build("stage", **{**GRPO, **changes}), record, drifted(record))


@pytest.mark.parametrize("name", ["grpo", "stage", "stage_released"])
@pytest.mark.parametrize("group", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_no_policy_gradient(name: str, group: int, dtype: torch.dtype) -> None:
    # float32 rewards of 0.7; only the KL would act, and it is off
    record = rollout(scores(torch.full((1, group), 0.7), ["geneval"]), dtype=dtype)
    objective = build(name, beta=0.0, entropy_coefficient=0.0)
    credit, _ = objective.credit(record)
    assert not credit.advantages.any()
    value, gradient = evaluate(objective, record, drifted(record))
    assert value == 0
    assert not gradient.any()


def test_equal_rewards_leave_the_gradient_of_the_kl_alone() -> None:
    record = rollout(scores(torch.full((1, 8), 0.7)), dtype=torch.float64)
    logps = drifted(record)
    _, gradient = evaluate(build("grpo", beta=1.0), record, logps)
    # d/dlp of the mean of k3 is (1 - exp(lr - lp)) / (G L)
    assert record.reference is not None
    expected = (1 - (record.reference.logps - logps.detach()).exp()) / (8 * 5)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_one_sample_best_has_no_entropy_reward() -> None:
    record = rollout(scores([[0.2, 0.9, 0.4]]))
    with_entropy, metrics = build("stage").credit(record)
    without, _ = build("stage", entropy_coefficient=0.0).credit(record)
    assert with_entropy.advantages.equal(without.advantages)
    assert metrics["reward/entropy_active_groups"] == 0


def test_a_group_of_one_is_a_clear_error() -> None:
    for name in ("grpo", "stage", "stage_released"):
        with pytest.raises(ValueError, match="at least 2 samples to have a baseline, got G = 1"):
            build(name).credit(rollout(scores([[1.0]])))


@pytest.mark.parametrize("name", ["grpo", "stage"])
def test_permuting_a_group_permutes_its_credit(name: str) -> None:
    record = rollout(scores(some_rewards("discrete", 2, 5, seed=2)))
    order = torch.tensor([3, 0, 4, 1, 2])

    def permute(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:, order]

    moved = replace(
        map_tensors(record, permute),
        **{key: map_tensors(getattr(record, key), permute) for key in ("scores", "old", "reference")},
    )
    objective = build(name)
    credit, changed = objective.credit(record)[0], objective.credit(moved)[0]
    for key in ("advantages", "token_weights", "kl_weights", "similarity", "old_logps"):
        if getattr(credit, key) is not None:
            torch.testing.assert_close(getattr(changed, key), permute(getattr(credit, key)), **EXACT)
    torch.testing.assert_close(changed.divisors, credit.divisors, **EXACT)


@pytest.mark.parametrize("shift", [0.3, -7.0, 100.0])
@pytest.mark.parametrize("kind", ["continuous", "discrete", "equal"])
def test_shifting_rewards_changes_nothing(shift: float, kind: str) -> None:
    rewards = some_rewards(kind, 2, 4, seed=4)
    objective, record = build("stage"), rollout(scores(rewards))
    value, gradient = evaluate(objective, record, drifted(record))
    moved = replace(record, scores=scores(rewards + shift))
    other, changed = evaluate(objective, moved, drifted(record))
    torch.testing.assert_close(other, value, **EXACT)
    torch.testing.assert_close(changed, gradient, **EXACT)


def test_two_prompts_never_mix() -> None:
    # the second prompt's rewards are far above: a shared baseline, maximum or similarity would show
    rewards = some_rewards("discrete", 2, 4, seed=6) + torch.tensor([[0.0], [50.0]])
    record, objective = rollout(scores(rewards)), build("stage")
    logps = drifted(record)
    value, gradient = evaluate(objective, record, logps)
    alone = []
    for prompt in range(2):
        part = slice(prompt, prompt + 1)
        single = replace(
            map_tensors(record, lambda tensor, part=part: tensor[part]),
            **{
                key: map_tensors(getattr(record, key), lambda tensor, part=part: tensor[part])
                for key in ("scores", "old", "reference")
            },
        )
        alone.append(evaluate(objective, single, logps[part].detach().requires_grad_()))
    torch.testing.assert_close(value, (alone[0][0] + alone[1][0]) / 2, **EXACT)
    torch.testing.assert_close(gradient, torch.cat([alone[0][1], alone[1][1]]) / 2, **EXACT)


def test_credit_is_stored_in_the_dtype_of_the_log_probabilities() -> None:
    for dtype, stored in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        credit, _ = build("stage").credit(rollout(scores([[0.0, 1.0, 1.0]]), dtype=dtype))
        tensors = [value for value in vars(credit).values() if isinstance(value, torch.Tensor)]
        assert {tensor.dtype for tensor in tensors} == {stored}


def test_credit_carries_no_gradient() -> None:
    record = rollout(scores([[0.0, 1.0, 1.0]]))
    assert record.reference is not None
    for score in (record.old, record.reference):
        score.logps.requires_grad_()
        score.entropy.requires_grad_()
    record.codes.requires_grad_()
    credit, _ = build("stage").credit(record)
    assert credit.reference is not None
    tensors = [*vars(credit).values(), *vars(credit.reference).values()]
    assert not any(value.requires_grad for value in tensors if isinstance(value, torch.Tensor))


def test_a_reference_is_needed_for_the_kl_and_for_the_entropy_reward() -> None:
    bare = rollout(scores([[0.0, 1.0]]), reference=False)
    for changes, needed in (
        ({"beta": 0.0, "entropy_coefficient": 0.0}, False),
        ({"beta": 0.1, "entropy_coefficient": 0.0}, True),
        ({"beta": 0.0, "entropy_coefficient": 0.4}, True),
    ):
        objective = build("stage", **changes)
        assert objective.needs_reference is needed
        if needed:
            with pytest.raises(ValueError, match="need reference scores, got None"):
                objective.credit(bare)
        else:
            credit, _ = objective.credit(bare)
            assert credit.reference_logps is None
            evaluate(objective, bare, drifted(bare))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(8, 5, 3)}, "codes must begin with"),
        ({"sampled_logps": torch.zeros(2, 4, 6)}, "sampled_logps must begin with"),
        ({"scores": scores(torch.zeros(4, 2))}, "scores.parts must begin with"),
        ({"scores": scores(torch.full((2, 4), math.nan), ["ocr"])}, "NaN or infinity in ocr"),
        ({"scores": replace(scores(torch.zeros(2, 4)), weights=(1.0, 2.0))}, "one name and one weight"),
    ],
)
def test_rollouts_that_do_not_fit_raise(change: dict[str, Any], message: str) -> None:
    record = rollout(scores(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match=message):
        build("stage").credit(replace(record, **change))


def test_scores_of_another_micro_batch_raise() -> None:
    record = rollout(scores([[0.0, 1.0]]))
    credit, _ = build("stage").credit(record)
    with pytest.raises(ValueError, match="same samples"):
        build("stage").loss(record.old, credit.micro_batch(slice(0, 1), slice(0, 1)))
