"""What an error leaves behind: a checkpoint of whole updates, or none; and what checkpoints say of the reward."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from stage.checkpoints import Checkpoints
from stage.loggers import MetricsFile, read_metrics
from stage.module import StageModule
from stage.training_checkpoint import read_training_checkpoint
from tests.tiny_training import Dying, Redness, same, tiny_base, tiny_module, tiny_trainer, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the base weights."""
    return tiny_base(tmp_path_factory.mktemp("janus"))


class Validates(Callback):
    """Scores an image after each update, as a validation does."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.scorer(torch.zeros(1, 2, 4, 4, 3, dtype=torch.uint8), [])


def rarely(
    folder: Path, module: StageModule, *callbacks: Callback, resume: Path | None = None
) -> StageModule:
    """Train with a checkpoint at the end alone."""
    keep = Checkpoints(
        folder=str(folder / "checkpoints"), every=100, keep=1, beside_training=False, monitor="none"
    )
    tiny_trainer(folder, [*callbacks, keep], [MetricsFile(folder)]).fit(
        module, ckpt_path=resume, weights_only=True
    )
    return module


def test_a_dead_reward_leaves_a_checkpoint_that_resumes_bit_for_bit(base: Path, tmp_path: Path) -> None:
    """The scorer fails in update 3, after it has drawn from torch's generator; the run goes on from update 2."""

    def module(at: int) -> StageModule:
        return tiny_module(base, scorer=Dying(0.3, at), updates=5)

    torch.manual_seed(1)
    whole = rarely(tmp_path / "whole", module(0))
    torch.manual_seed(1)
    with pytest.raises(ConnectionError, match="servers are gone"):
        rarely(tmp_path / "cut", module(3))
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert read_training_checkpoint(last)["update"] == 2
    torch.manual_seed(2)
    again = rarely(tmp_path / "cut", module(0), resume=last)
    assert same(weights(again), weights(whole)) and again.update == 5
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "cut")]
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found] for found in rows
    ]
    assert timeless[0] == timeless[1] and len(rows[0]) == 5


def test_a_reward_that_dies_after_an_update_keeps_that_update(base: Path, tmp_path: Path) -> None:
    """Calls 1 and 2 are update 1 and its validation; call 4, of the validation of update 2, fails."""
    with pytest.raises(ConnectionError):
        rarely(tmp_path, tiny_module(base, scorer=Dying(0.3, 4), updates=5), Validates())
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_training_checkpoint(last)["update"] == 2
    assert rarely(tmp_path, tiny_module(base, updates=3), resume=last).update == 3


class BreaksStep(torch.optim.SGD):
    """Moves the weights and fails, in its step number 2."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("the device is lost")
        return found


def test_nothing_is_saved_between_two_updates(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the device is lost"):
        rarely(tmp_path / "step", tiny_module(base, optimizer=partial(BreaksStep, lr=1e-3)))
    with pytest.raises(ConnectionError):
        rarely(tmp_path / "first", tiny_module(base, scorer=Dying(0.3, 1)))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_checkpoints_say_what_the_reward_was_made_of(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scorer(digest: str) -> Redness:
        found: Any = Redness()
        found.provenance = {"path": "here", "revision": "v1", "sha256": {"w.pt": digest}}
        return found

    rarely(tmp_path, tiny_module(base, scorer=scorer("a"), updates=1))
    last = tmp_path / "checkpoints" / "last.ckpt"
    record = {
        "class": "tests.tiny_training.Redness",
        "weights": {"path": "here", "revision": "v1", "sha256": {"w.pt": "a"}},
    }
    assert read_training_checkpoint(last)["reward"] == record
    rarely(tmp_path, tiny_module(base, scorer=scorer("a"), updates=2), resume=last)
    assert "changed" not in capsys.readouterr().out
    rarely(tmp_path, tiny_module(base, scorer=scorer("b"), updates=3), resume=last)
    assert "changed since the checkpoint: weights of the reward, weights.w.pt" in capsys.readouterr().out
