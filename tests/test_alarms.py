"""Alarms about the reward: when they speak, when they keep silent, and what a broken reward leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stage.alarms import ConstantReward, RewardHacking, UnusableRewards, trend
from stage.ranks import PeerError
from stage.types import Prompt, Scores
from tests.tiny_training import Redness, tiny_base, tiny_module, tiny_trainer

TRAINER: Any = SimpleNamespace(is_global_zero=True)


def feed(callback: Any, rows: Sequence[dict[str, float]]) -> None:
    for row in rows:
        callback.on_train_batch_end(TRAINER, SimpleNamespace(latest=row), None, None, 0)


def constant(count: int, informative: float = 0.0) -> list[dict[str, float]]:
    return [{"reward/informative_groups": informative, "reward/mean": 0.25}] * count


def test_a_constant_reward_is_said_after_so_many_updates(capsys: pytest.CaptureFixture[str]) -> None:
    callback = ConstantReward(patience=3)
    feed(callback, [*constant(2), *constant(1, 0.5), *constant(2)])
    assert capsys.readouterr().err == ""
    feed(callback, constant(1))
    assert "the same for all samples of each prompt in 3 updates, 0.25 on average" in capsys.readouterr().err
    feed(callback, constant(3))
    assert "in 6 updates" in capsys.readouterr().err
    with pytest.raises(ValueError, match="at least 1 update; got 0"):
        ConstantReward(patience=0)


def rows(rewards: Sequence[float], heldout: Sequence[float]) -> list[dict[str, float]]:
    return [{"reward/mean": a, "reward/hps/score": b} for a, b in zip(rewards, heldout, strict=True)]


def noisy(start: float, end: float, count: int, seed: int) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, 0.02, count)
    return (np.linspace(start, end, count) + noise).tolist()


@pytest.mark.parametrize(
    ("reward", "heldout", "speaks"),
    [((0.2, 0.8), (0.6, 0.3), True), ((0.2, 0.8), (0.3, 0.6), False), ((0.8, 0.2), (0.6, 0.3), False),
     ((0.2, 0.8), (0.5, 0.5), False), ((0.5, 0.5), (0.6, 0.3), False)],
)  # fmt: skip
def test_the_reward_rises_and_the_held_out_scorer_falls(
    reward: tuple[float, float],
    heldout: tuple[float, float],
    speaks: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    callback = RewardHacking(part="hps/score", window=20, errors=3.0)
    feed(callback, rows(noisy(*reward, 60, 0), noisy(*heldout, 60, 1)))
    said = capsys.readouterr().err
    assert said.count("warning:") == int(speaks)  # once, though it goes on for 40 updates
    assert not speaks or "while hps/score, which is not trained on, fell by" in said


def test_hacking_is_said_again_after_it_has_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    callback = RewardHacking(part="hps/score", window=10, errors=3.0)
    for _ in range(2):
        feed(callback, rows(noisy(0.2, 0.8, 20, 0), noisy(0.6, 0.3, 20, 1)))
        feed(callback, rows(noisy(0.8, 0.2, 20, 2), [0.3] * 20))
    assert capsys.readouterr().err.count("warning:") == 2


def test_the_held_out_part_must_be_there() -> None:
    feed(RewardHacking(part=None, window=4, errors=1.0), [{}])
    with pytest.raises(ValueError, match=r"got 'hpsv2'\. Parts are among hps/score, mean\."):
        feed(RewardHacking(part="hpsv2", window=4, errors=1.0), rows([0.1], [0.2]))
    for window, errors in ((3, 1.0), (4, 0.0)):
        with pytest.raises(ValueError, match="got"):
            RewardHacking(part=None, window=window, errors=errors)


def test_the_trend_by_hand() -> None:
    # Halves (1, 3) and (5, 9): means 2 and 7, variances 2 and 8, standard error sqrt((2 + 8) / 2).
    assert trend([1, 3, 5, 9]) == pytest.approx(5 / 5**0.5)
    assert trend([1, 3, 100, 5, 9]) == trend([1, 3, 5, 9])
    assert (
        trend([1, 1, 1, 1]) == 0
        and trend([1, 1, 2, 2]) == float("inf")
        and trend([2, 2, 1, 1]) == -float("inf")
    )


class BreaksLater:
    """Redness that leaves its range, or is NaN, for two images of the second rollout."""

    def __init__(self, value: float) -> None:
        self.value, self.calls = value, 0
        self.images: Tensor | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        found = Redness()(images, prompts)
        self.calls += 1
        if self.calls == 2:
            found.parts[0, 1, 0] = found.parts[1, 3, 0] = self.value
            self.images = images
        return Scores(found.parts, found.names, found.weights, found.reasons, ranges=((0.0, 1.0), (0.0, 1.0)))


@pytest.mark.parametrize("value", [float("nan"), 1.5])
def test_training_stops_on_a_broken_reward_and_keeps_its_images(value: float, tmp_path: Path) -> None:
    scorer = BreaksLater(value)
    module = tiny_module(tiny_base(tmp_path / "janus"), scorer=scorer)
    keep = UnusableRewards(folder=str(tmp_path / "kept"), most=8)
    with pytest.raises(ValueError, match=f"sample 1 of .* got {value} in part 'red'") as caught:
        tiny_trainer(tmp_path, [keep]).fit(module)
    assert module.update == 1  # the first update stands, the second has changed nothing
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == [
        "update_00002.txt", "update_00002_00.png", "update_00002_01.png",
    ]  # fmt: skip
    assert scorer.images is not None
    for index, place in enumerate([(0, 1), (1, 3)]):
        saved = np.asarray(Image.open(tmp_path / "kept" / f"update_00002_{index:02d}.png"))
        assert np.array_equal(saved, scorer.images[place].numpy())
    notes = (tmp_path / "kept" / "update_00002.txt").read_text(encoding="utf-8").splitlines()
    assert len(notes) == 2 and notes[1].startswith("update_00002_01.png: sample 3 of ")
    assert caught.value.__notes__ == [f"the images that this is about are in {tmp_path / 'kept'}"]


def test_the_first_process_says_where_another_keeps_its_images(tmp_path: Path) -> None:
    error = PeerError("process 1 of 2 failed: UnusableScores: reward parts must be finite", "UnusableScores")
    UnusableRewards(folder=str(tmp_path / "kept"), most=8).on_exception(TRAINER, None, error)
    assert error.__notes__ == [f"the images that this is about are in {tmp_path / 'kept'}"]
    assert not (tmp_path / "kept").exists()


def test_other_errors_leave_nothing(tmp_path: Path) -> None:
    UnusableRewards(folder=str(tmp_path / "kept"), most=8).on_exception(TRAINER, None, ValueError("other"))
    assert not (tmp_path / "kept").exists()


def test_schedules_reach_the_update(tmp_path: Path) -> None:
    """The weight of update u, counted from 0, is what is trained on: 0 at first, then 2."""

    def scorer(images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        found = Redness()(images, prompts)
        schedules: Any = ((lambda update: 2.0 * update,), ())
        return Scores(found.parts, found.names, found.weights, found.reasons, schedules=schedules)

    seen: list[dict[str, float]] = []
    module = tiny_module(tiny_base(tmp_path / "janus"), scorer=scorer, updates=2)
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> None:
        step(batch, batch_idx)
        seen.append(dict(module.latest))

    module.training_step = training_step  # type: ignore[method-assign]
    tiny_trainer(tmp_path).fit(module)
    assert seen[0]["reward/mean"] == 0 and seen[0]["reward/red"] > 0
    assert seen[1]["reward/mean"] == pytest.approx(2 * seen[1]["reward/red"])
    assert torch.isfinite(torch.tensor(seen[1]["loss/total"]))
