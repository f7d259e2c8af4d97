"""Gathered weights are lent once for validation, pictures and the next rollout, and to nobody else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from stage.callbacks import ImageGrid, Validation
from stage.group_draws import Stopwatch
from stage.lender import Lender
from stage.policy import gathered as room
from stage.policy.sampler import Sampler
from stage.types import Prompt, Scores
from tests.processes import run
from tests.test_strategy import FSDP
from tests.tiny_training import PROMPTS, Redness, tiny_base, tiny_module, tiny_trainer, write_prompts

UPDATES = 3


class Looking(Redness):
    """Notes whether a copy of the weights lies there whenever images are judged."""

    def __init__(self) -> None:
        super().__init__()
        self.module: Any = None
        self.seen: list[bool] = []

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        inner = self.module.lender._gathered
        self.seen.append(inner is not None and inner.policy.rollout_weights is not None)
        return super().__call__(images, prompts)


class Releasing(Sampler):
    """Counts how often its memory is asked back."""

    released = 0

    def release(self) -> None:
        type(self).released += 1
        super().release()


def train(
    base: Path, prompt_file: str, folder: Path, strategy: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Three updates, with validation and a picture before the first and after every one."""
    copies, make, owner = [0], room.RolloutWeights, vars(room)

    def counted(*arguments: Any) -> Any:
        copies[0] += 1
        return make(*arguments)

    scorer, Releasing.released = Looking(), 0
    module = tiny_module(base, scorer=scorer, sampler=Releasing(1.0, 1.0), updates=UPDATES)
    scorer.module = module
    shown = [
        Validation(prompts=prompt_file, samples=2, seed=9, every=1, prompts_per_batch=2),
        ImageGrid(folder=str(folder / "images"), prompts=prompt_file, count=1, samples=1, seed=9, every=1),
    ]
    rows: list[dict[str, float]] = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            rows.append(dict(pl_module.latest))

    changes = {"strategy": dict(strategy), "devices": int(os.environ["WORLD_SIZE"])} if strategy else {}
    trainer = tiny_trainer(folder, [*shown, Keep()], [], **changes)
    owner["RolloutWeights"] = counted
    try:
        trainer.fit(module)
    finally:
        owner["RolloutWeights"] = make
    inner = module.lender._gathered
    left = inner is not None and inner.policy.rollout_weights is not None
    return {
        "copies": copies[0],
        "seen": scorer.seen,
        "rows": rows,
        "left": left,
        "released": Releasing.released,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS[:4])


@pytest.mark.slow
def test_an_update_gathers_once(base: Path, prompt_file: str, tmp_path: Path) -> None:
    """Validation before the first update gathers for a picture and the rollout; so does the one after each update.

    What is validated are the weights of that moment: the numbers are those of one process.
    """
    alone = train(base, prompt_file, tmp_path / "alone")
    for found in run(2, tmp_path / "results", train, base, prompt_file, tmp_path / "runs", FSDP):
        assert found["copies"] == UPDATES + 1 and not found["left"]
        # One batch of a validation and then the rollout, in turns: the reward of an update sees no copy.
        assert found["seen"] == [*[True, False] * UPDATES, True]
        for row, expected in zip(found["rows"], alone["rows"], strict=True):
            assert row["validation/reward"] == pytest.approx(expected["validation/reward"], abs=1e-5)
            assert 0 <= row["time/gather"] < row["time/total"]
            shares = [row[f"time/{part}_share"] for part in ("gather", "rollout", "reward", "update")]
            assert sum(shares) == pytest.approx(1)
    rewards = [row["validation/reward"] for row in alone["rows"]]
    assert len(set(rewards)) == UPDATES  # weights have moved


def test_the_sampler_gives_its_memory_back(base: Path, prompt_file: str, tmp_path: Path) -> None:
    """After validation and picture (four times each) too, not only in a rollout."""
    found = train(base, prompt_file, tmp_path)
    assert found["released"] >= 2 * (UPDATES + 1) + UPDATES and found["copies"] == 0


class Part:
    """Stands for gathered weights and says what becomes of them."""

    copied = True

    def __init__(self) -> None:
        self.events: list[str] = []

    def filled(self) -> Any:
        self.events.append("gathered")
        return torch.no_grad()

    def release(self) -> None:
        self.events.append("given back")


def test_the_last_who_draws_gives_weights_back_also_after_an_error() -> None:
    part: Any = Part()
    lender, watch = Lender("policy", Releasing(1.0, 1.0), part), Stopwatch(torch.device("cpu"))
    with lender.lend():
        pass
    assert part.events == ["gathered"]
    with pytest.raises(FloatingPointError), lender.lend_last(watch):
        raise FloatingPointError
    assert part.events == ["gathered", "gathered", "given back"] and watch.seconds["gather"] >= 0
    whole = Lender("policy", Releasing(1.0, 1.0))
    with whole.lend_last(watch) as policy:
        assert policy == "policy" and whole.alone and not whole.sliced
