"""Rewards of several parts: standardised and decoupled advantages against loops, gates, schedules, contributions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.objective.advantage import GroupAdvantage, gated_parts, task_rewards
from stage.objective.parts import DecoupledAdvantage, StandardisedParts
from stage.types import Scores
from tests.objective.example import build, rollout, scores

EPSILON = 1e-4


def some(seed: int = 0, prompts: int = 3, group: int = 5) -> Scores:
    """Three parts of very different size; the second is constant in group 0, the last group has equal parts."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.rand(prompts, group, 3, generator=generator, dtype=torch.float64)
    parts = parts * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, -30.0, 5.0])
    parts[0, :, 1] = 0.7
    parts[-1] = torch.tensor([0.1, 0.2, 0.3])
    return scores(parts, ["a", "b/x", "b/y"], [1.0, 0.5, 2.0])


def zscores(column: list[float]) -> list[float]:
    """Of one part in one group, in plain Python; a constant column gives zeros."""
    if max(column) - min(column) <= 1e-6 * max(1.0, abs(max(column))):
        return [0.0] * len(column)
    mean = sum(column) / len(column)
    std = math.sqrt(sum((value - mean) ** 2 for value in column) / (len(column) - 1))
    return [(value - mean) / (std + EPSILON) for value in column]


def sums(found: Scores, raw: tuple[str, ...] = ()) -> list[list[float]]:
    """The weighted sum of each sample, by loops; a closed gate is a value of 0 that is standardised with the rest."""
    rows = []
    for p in range(found.parts.shape[0]):
        total = [0.0] * found.parts.shape[1]
        for k, name in enumerate(found.names):
            column = [
                0.0 if found.gates is not None and not found.gates[p, g, k] else found.parts[p, g, k].item()
                for g in range(len(total))
            ]
            values = column if name in raw else zscores(column)
            total = [t + found.weights[k] * value for t, value in zip(total, values, strict=True)]
        rows.append(total)
    return rows


def gated(found: Scores, seed: int = 5) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return replace(found, gates=torch.rand(found.parts.shape, generator=generator) > 0.3)


@pytest.mark.parametrize("raw", [(), ("a",), ("b/x", "b/y")])
@pytest.mark.parametrize("closed", [False, True])
def test_standardised_parts_against_a_loop(raw: tuple[str, ...], closed: bool) -> None:
    found = gated(some()) if closed else some()
    slot = StandardisedParts(epsilon=EPSILON, raw=["b"] if len(raw) == 2 else raw)
    values = slot(scores=found, bonus=None, tied_groups="raw")
    expected = [zscores(row) for row in sums(found, raw)]
    torch.testing.assert_close(
        values.values, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=1e-10
    )
    assert values.contributions is not None
    torch.testing.assert_close(
        values.contributions.sum(-1),
        torch.tensor(sums(found, raw), dtype=torch.float64),
        atol=1e-10,
        rtol=1e-10,
    )
    assert values.kept.all() and values.bonus is None


@pytest.mark.parametrize("closed", [False, True])
def test_decoupled_advantages_against_a_loop(closed: bool) -> None:
    found = gated(some()) if closed else some()
    rows = sums(found)
    every = [value for row in rows for value in row]
    mean = sum(every) / len(every)
    assert abs(mean) < 1e-12  # why it is not subtracted
    std = math.sqrt(sum((value - mean) ** 2 for value in every) / (len(every) - 1))
    expected = torch.tensor(
        [[(v - mean) / (std + EPSILON) for v in row] for row in rows], dtype=torch.float64
    )
    values = DecoupledAdvantage(epsilon=EPSILON)(scores=found, bonus=None, tied_groups="raw").values
    torch.testing.assert_close(values, expected, atol=1e-10, rtol=1e-10)
    if not closed:
        assert not values[-1].any()


def test_decoupling_by_hand() -> None:
    # Group 0: parts agree, z = (-1, 1) / sqrt(2) twice, sum (-1, 1) sqrt(2). Group 1: they cancel out, sum 0.
    found = scores([[[0.0, 0.0], [1.0, 9.0]], [[0.0, 9.0], [1.0, 0.0]]])
    values = DecoupledAdvantage(epsilon=0.0)(scores=found, bonus=None, tied_groups="raw").values
    # Over the batch: squares 2 + 2 + 0 + 0 over 3, std sqrt(4 / 3); sqrt(2) / sqrt(4 / 3) = sqrt(3 / 2).
    expected = [[-math.sqrt(1.5), math.sqrt(1.5)], [0.0, 0.0]]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    # Added up as they are, the second part decides, and both groups weigh the same.
    plain = GroupAdvantage(epsilon=0.0)(scores=found, bonus=None, tied_groups="raw").values
    assert plain[1, 0] > 0.7 and plain[0, 1] == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    "slot", [StandardisedParts(epsilon=1e-12, raw=[]), DecoupledAdvantage(epsilon=1e-12)]
)
def test_units_do_not_matter_and_rounding_teaches_nothing(slot: Any) -> None:
    found = some()
    values = slot(scores=found, bonus=None, tied_groups="raw").values
    scaled = replace(found, parts=found.parts * torch.tensor([1e4, 0.5, 300.0]) + 3.0)
    torch.testing.assert_close(
        slot(scores=scaled, bonus=None, tied_groups="raw").values, values, atol=1e-6, rtol=0
    )
    noise = torch.tensor([[[0.1 + 0.2], [0.3], [0.3], [0.1 + 0.2]]], dtype=torch.float64)
    assert not slot(scores=scores(noise), bonus=None, tied_groups="raw").values.any()


@pytest.mark.parametrize("tied_groups", ["raw", "zero", "normalise"])
def test_the_entropy_reward_in_tied_groups(tied_groups: str) -> None:
    found = some()
    bonus = torch.tensor([[0.1, -0.1, 0.3, 0.0, 0.2]], dtype=torch.float64).expand(3, 5)
    values = DecoupledAdvantage(epsilon=EPSILON)(scores=found, bonus=lambda _: bonus, tied_groups=tied_groups)
    alone = bonus[0] - 0.1
    expected = {
        "raw": alone,
        "zero": alone * 0,
        "normalise": torch.tensor(zscores(bonus[0].tolist()), dtype=torch.float64),
    }[tied_groups]
    torch.testing.assert_close(values.values[-1], expected.double(), atol=1e-10, rtol=0)
    # In the others it is added before the division: centred sums of rewards and bonus over the std of all.
    rows = [[v + b - 0.1 for v, b in zip(row, bonus[0].tolist(), strict=True)] for row in sums(found)[:-1]]
    every = [value for row in rows for value in row] + [0.0] * 5
    std = math.sqrt(sum(value**2 for value in every) / (len(every) - 1))
    expected = torch.tensor(rows, dtype=torch.float64) / (std + EPSILON)
    torch.testing.assert_close(values.values[:-1], expected, atol=1e-9, rtol=0)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'c', parts are a, b/x, b/y"):
        StandardisedParts(epsilon=EPSILON, raw=["c"])(scores=some(), bonus=None, tied_groups="raw")
    for slot in ("StandardisedParts", "DecoupledAdvantage"):
        node = {"_target_": f"stage.objective.parts.{slot}", "epsilon": EPSILON}
        node |= {"raw": []} if slot == "StandardisedParts" else {}
        with pytest.raises(Exception, match="tied_groups must be one of"):
            build("grpo", tied_groups="none", advantage=node)
        with pytest.raises(ValueError, match="at least 2 samples"):
            build("grpo", advantage=node).advantage(scores=scores([[1.0]]), bonus=None, tied_groups="raw")


def test_closed_gates_count_as_zero_everywhere() -> None:
    found = gated(some())
    zeroed = replace(found, parts=found.parts.masked_fill(~found.gates, 0.0), gates=None)  # type: ignore[operator]
    assert torch.equal(gated_parts(found), zeroed.parts)
    assert torch.equal(task_rewards(found), task_rewards(zeroed))
    for name in ("grpo", "stage_released"):
        one = [
            replace(s, parts=s.parts[:1], gates=None if s.gates is None else s.gates[:1])
            for s in (found, zeroed)
        ]
        credits = [build(name, entropy_coefficient=0.0).credit(rollout(s))[0].advantages for s in one]
        assert torch.equal(*credits)
    raw, added = (build("grpo").credit(rollout(s))[1] for s in (found, zeroed))
    assert raw["reward/a"] != added["reward/a"] and raw["contribution/a"] == added["contribution/a"]


def test_open_gates_change_nothing() -> None:
    found = some()
    opened = replace(found, gates=torch.ones(found.parts.shape, dtype=torch.bool))
    assert torch.equal(task_rewards(found), task_rewards(opened))
    assert build("stage").credit(rollout(found))[1] == build("stage").credit(rollout(opened))[1]


def test_weights_at_an_update() -> None:
    found = some()
    assert found.at(7) is found
    planned = replace(found, schedules=((), (lambda u: u / 10,), (lambda u: 2.0, lambda u: float(u))))
    assert planned.at(5).weights == (1.0, 0.25, 20.0)  # 1; 0.5 * 0.5; 2 * 2 * 5
    assert planned.at(5).schedules is None and planned.weights == found.weights


def test_contributions_are_logged_beside_the_parts() -> None:
    parts: Tensor = torch.tensor([[[1.0, 4.0], [3.0, 0.0]]], dtype=torch.float64)
    _, metrics = build("grpo").credit(rollout(scores(parts, ["a", "b"], [2.0, 0.5])))
    assert metrics["reward/a"] == 2.0 and metrics["reward/b"] == 2.0
    assert metrics["contribution/a"] == 4.0 and metrics["contribution/b"] == 1.0
    # Stds of (2, 6) and of (2, 0).
    assert metrics["contribution_std/a"] == pytest.approx(math.sqrt(8))
    assert metrics["contribution_std/b"] == pytest.approx(math.sqrt(2))
    _, single = build("grpo").credit(rollout(scores(parts[..., 0])))
    assert not [name for name in single if name.startswith("contribution")]
