from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stage.objective.advantage import GroupAdvantage, ReleasedAdvantage, best, centred, task_rewards, tied
from tests.objective.example import scores


def group_advantage(parts: Tensor, bonus: Tensor | None = None, tied_groups: str = "raw") -> Tensor:
    slot = GroupAdvantage(epsilon=1e-4)
    given = None if bonus is None else lambda _: bonus
    return slot(scores=scores(parts), bonus=given, tied_groups=tied_groups).values


def released(parts: Tensor, names: list[str], bonus: Tensor | None = None, **more: object) -> Tensor:
    slot = ReleasedAdvantage(epsilon=1e-4, filtered=["geneval", "ocr", "partial"])
    given = None if bonus is None else lambda _: bonus
    found = scores(parts, names, **more)  # type: ignore[arg-type]
    return slot(scores=found, bonus=given, tied_groups="normalise").values


def test_by_hand() -> None:
    # rewards 0, 1, 2, 5: mean 2, deviations -2, -1, 0, 3, sum of squares 14, std sqrt(14/3)
    expected = torch.tensor([[-2.0, -1.0, 0.0, 3.0]], dtype=torch.float64) / (math.sqrt(14 / 3) + 1e-4)
    torch.testing.assert_close(
        group_advantage(torch.tensor([[0.0, 1.0, 2.0, 5.0]])), expected, atol=0, rtol=1e-15
    )


def test_parts_are_weighted_and_a_part_of_weight_zero_counts_for_nothing() -> None:
    # 2 * (1, 0) + 0.5 * (0, 2) + 0 * (9, -9) = (2, 1)
    found = scores([[[1.0, 0.0, 9.0], [0.0, 2.0, -9.0]]], weights=[2.0, 0.5, 0.0])
    assert task_rewards(found).tolist() == [[2.0, 1.0]]


def test_weights_are_not_rounded_to_the_dtype_of_the_parts() -> None:
    found = scores(torch.ones(1, 2, 1, dtype=torch.float32), weights=[0.1])
    assert task_rewards(found).tolist() == [[0.1, 0.1]]


@pytest.mark.parametrize("size", [2, 3, 5, 7, 8, 10])
@pytest.mark.parametrize("value", [0.7, 0.1, -1e4 / 3, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied_groups", ["raw", "zero", "normalise"])
def test_equal_rewards_have_no_advantage_at_all(
    size: int, value: float, dtype: torch.dtype, tied_groups: str
) -> None:
    assert not group_advantage(torch.full((1, size), value, dtype=dtype), tied_groups=tied_groups).any()


def test_rounding_does_not_break_a_tie() -> None:
    # 0.1 + 0.2 is 0.30000000000000004 in float64, and 0.3 is not
    parts = torch.tensor([[[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]]], dtype=torch.float64)
    assert tied(task_rewards(scores(parts))).item()
    assert best(task_rewards(scores(parts))).all()
    assert not group_advantage(parts).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_decide_the_sign_at_the_mean(dtype: torch.dtype) -> None:
    # the mean of 0.1, 0.2, 0.3 is 0.2: the middle sample is neither good nor bad
    values = group_advantage(torch.tensor([[0.1, 0.2, 0.3]], dtype=dtype))
    assert values[0, 1] == 0
    assert values[0, 0] < 0 < values[0, 2]


def test_a_tie_scales_with_the_rewards() -> None:
    assert tied(torch.tensor([[1e6, 1e6 + 0.5]], dtype=torch.float64)).item()
    assert not tied(torch.tensor([[1e6, 1e6 + 2.0]], dtype=torch.float64)).item()
    assert tied(torch.tensor([[-1e6, -1e6 - 0.5]], dtype=torch.float64)).item()
    assert tied(torch.tensor([[0.0, 9e-7]], dtype=torch.float64)).item()
    assert not tied(torch.tensor([[0.0, 2e-6]], dtype=torch.float64)).item()


def test_what_a_tied_group_gets_from_the_entropy_reward() -> None:
    # entropy rewards 0.3, -0.1, -0.2 sum to 0; their std is sqrt((0.09 + 0.01 + 0.04) / 2) = sqrt(0.07)
    bonus = torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64)
    rewards = torch.full((1, 3), 0.7)
    torch.testing.assert_close(group_advantage(rewards, bonus, "raw"), bonus, atol=1e-15, rtol=0)
    assert not group_advantage(rewards, bonus, "zero").any()
    expected = bonus / (math.sqrt(0.07) + 1e-4)
    torch.testing.assert_close(group_advantage(rewards, bonus, "normalise"), expected, atol=0, rtol=1e-14)


def test_a_group_with_variance_is_normalised_whatever_happens_to_ties() -> None:
    # rewards 0, 1, 1 and entropy rewards 0, 0.2, -0.2: total 0, 1.2, 0.8, mean 2/3, squares 0.7467, ddof 1
    bonus = torch.tensor([[0.0, 0.2, -0.2]], dtype=torch.float64)
    total = torch.tensor([[0.0, 1.2, 0.8]], dtype=torch.float64)
    squares = (2 / 3) ** 2 + (1.2 - 2 / 3) ** 2 + (0.8 - 2 / 3) ** 2
    expected = (total - 2 / 3) / (math.sqrt(squares / 2) + 1e-4)
    for tied_groups in ("raw", "zero", "normalise"):
        values = group_advantage(torch.tensor([[0.0, 1.0, 1.0]]), bonus, tied_groups)
        torch.testing.assert_close(values, expected, atol=0, rtol=1e-14)


def test_centring_equal_values_is_exact() -> None:
    assert not centred(torch.full((1, 7), 0.1, dtype=torch.float64)).any()


@pytest.mark.parametrize("slot", [group_advantage, lambda parts: released(parts, ["geneval"])])
def test_a_group_of_one_raises(slot: object) -> None:
    with pytest.raises(ValueError, match="at least 2 samples"):
        slot(torch.tensor([[1.0]]))  # type: ignore[operator]


def test_released_drops_columns_without_variance_in_two_recipes() -> None:
    parts = torch.tensor([[[0.0, 3.0], [1.0, 3.0 + 1e-7], [2.0, 3.0]]], dtype=torch.float64)
    alone = group_advantage(parts[..., :1])
    for names in (["geneval", "hps"], ["hps", "ocr"]):
        torch.testing.assert_close(released(parts, names), alone, atol=0, rtol=1e-15)
    # kept elsewhere: totals 3, 4 + 1e-7, 5
    kept = group_advantage(parts.sum(dim=-1))
    assert kept[0, 1] == 0  # within the tolerance of the mean; the published code knows none
    assert released(parts, ["hps", "git"])[0, 1] == pytest.approx(2e-7 / 3 / (1 + 1e-4), rel=1e-6)


@pytest.mark.parametrize("size", [3, 6, 7, 8])
def test_released_equal_rewards_have_no_advantage_at_all(size: int) -> None:
    # the mean of three times 0.1 is 0.10000000000000002
    assert not released(torch.full((1, size), 0.1, dtype=torch.float64), ["hps"]).any()


def test_released_sees_the_recipe_in_a_piece_of_the_name_and_only_in_parts_that_count() -> None:
    bonus = torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64)
    rewards = torch.zeros(1, 3, dtype=torch.float64)
    assert released(rewards, ["shapes/partial"], bonus).any()
    assert not released(rewards, ["genevalish"], bonus).any()
    parts = torch.zeros(1, 3, 2, dtype=torch.float64)
    assert not released(parts, ["hps", "geneval"], bonus, weights=[1.0, 0.0]).any()


def test_released_keeps_nothing_only_without_columns_and_without_entropy_reward() -> None:
    slot = ReleasedAdvantage(epsilon=1e-4, filtered=["geneval", "ocr"])
    flat = torch.full((1, 4), 0.5, dtype=torch.float64)
    bonus = torch.tensor([[0.1, -0.1, 0.0, 0.0]], dtype=torch.float64)

    def kept(name: str, parts: Tensor, extra: Tensor | None) -> bool:
        given = None if extra is None else lambda _: extra
        return slot(scores=scores(parts, [name]), bonus=given, tied_groups="normalise").kept.item()  # type: ignore[return-value]

    assert not kept("geneval", flat, None)
    assert kept("geneval", flat, bonus)
    assert kept("hps", flat, None)
    assert kept("geneval", torch.tensor([[0.0, 1.0, 0.0, 0.0]]), None)


def test_released_refuses_two_prompts() -> None:
    with pytest.raises(ValueError, match="one prompt a rank, got 2"):
        released(torch.rand(2, 4), ["geneval"])
