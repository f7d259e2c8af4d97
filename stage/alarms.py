"""Alarms about the reward: it stands still, it rises while a scorer that is not trained on falls, it is no reward."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from lightning.pytorch import Callback, Trainer
from PIL import Image

from stage.ranks import PeerError
from stage.score_checks import UnusableScores
from stage.whole_files import atomic_write

REWARD = "reward/mean"


def say(trainer: Trainer, text: str) -> None:
    """One line on stderr, from one process."""
    if trainer.is_global_zero:
        print(f"warning: {text}", file=sys.stderr, flush=True)


class ConstantReward(Callback):
    """Says when the reward has been the same for all samples of each prompt for many updates in a row.

    Nothing of the reward is learned from such groups: what is left are KL and entropy reward, where they are on. It is
    said again after as many updates more.

    Args:
        patience: updates in a row without a difference.
    """

    def __init__(self, *, patience: int) -> None:
        if patience < 1:
            raise ValueError(
                f"callbacks.constant_reward.patience must be at least 1 update; got {patience}. Raise it."
            )
        self.patience = patience
        self.idle = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.idle = self.idle + 1 if pl_module.latest.get("reward/informative_groups") == 0 else 0
        if self.idle and self.idle % self.patience == 0:
            say(
                trainer,
                f"the reward was the same for all samples of each prompt in {self.idle} updates, "
                f"{pl_module.latest[REWARD]:.4g} on average in the last; nothing is learned from it. Look at the "
                "images, take easier prompts, a reward with partial credit or a higher sampler.temperature.",
            )


class RewardHacking(Callback):
    """Says when the reward rises while a scorer that is not trained on falls: the policy learns the scorer's faults.

    The means of the older and of the newer half of the last `window` updates are compared, for the reward and for the
    held-out part; a difference counts when it is more than `errors` times its standard error (Welch). It is said
    once, and again after one of the two has turned round.

    Args:
        part: a part of the reward with weight 0, named as in the logs (`hps/score` of a combination); null turns
            this off.
        window: updates that are looked at, at least 4.
        errors: standard errors by which a half must differ from the other.
    """

    def __init__(self, *, part: str | None, window: int, errors: float) -> None:
        if window < 4:
            raise ValueError(
                f"callbacks.reward_hacking.window must be at least 4 updates; got {window}. Raise it."
            )
        if not errors > 0:
            raise ValueError(f"callbacks.reward_hacking.errors must be above 0; got {errors}. Raise it.")
        self.part, self.window, self.errors = part, window, errors
        self.seen: deque[tuple[float, float]] = deque(maxlen=window)
        self.said = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.part is None:
            return
        metric = f"reward/{self.part}"
        if metric not in pl_module.latest:
            parts = sorted(n.removeprefix("reward/") for n in pl_module.latest if n.startswith("reward/"))
            raise ValueError(
                f"callbacks.reward_hacking.part must be a part of the reward; got {self.part!r}. Parts are among "
                f"{', '.join(parts)}."
            )
        self.seen.append((pl_module.latest[REWARD], pl_module.latest[metric]))
        if len(self.seen) < self.window:
            return
        rewards, heldout = (trend(values) for values in zip(*self.seen, strict=True))
        if rewards <= 0 or heldout >= 0:
            self.said = False
        elif rewards > self.errors and heldout < -self.errors and not self.said:
            self.said = True
            say(
                trainer,
                f"over the last {self.window} updates the reward rose by {rewards:.1f} standard errors while "
                f"{self.part}, which is not trained on, fell by {-heldout:.1f}: the policy may be learning the "
                "faults of the reward. Compare images/, raise algorithm.beta or give the held-out scorer a weight.",
            )


def trend(values: Sequence[float]) -> float:
    """Newer half minus older half in standard errors; the middle one of an odd number is left out.

    Without any spread the sign of the difference times infinity, and 0 where nothing changed.
    """
    half = len(values) // 2
    older, newer = values[:half], values[len(values) - half :]
    difference = fmean(newer) - fmean(older)
    error = ((variance(older) + variance(newer)) / half) ** 0.5
    if error == 0:
        return 0.0 if difference == 0 else float("inf") * difference
    return difference / error


class UnusableRewards(Callback):
    """Saves the images for which a scorer gave no number, or one out of its range, before training ends on it.

    Args:
        folder: where they go: `update_00020_00.png` and so on, and what is wrong with each in `update_00020.txt`.
        most: images that are saved.
    """

    def __init__(self, *, folder: str, most: int) -> None:
        self.folder, self.most = Path(folder), most

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, UnusableScores):
            self._save(trainer, pl_module, exception)
        elif not isinstance(exception, PeerError) or exception.kind != UnusableScores.__name__:
            return
        exception.add_note(f"the images that this is about are in {self.folder}")

    def _save(self, trainer: Trainer, pl_module: Any, exception: UnusableScores) -> None:
        name = f"update_{pl_module.update + 1:05d}"
        if trainer.world_size > 1:
            name += f"_rank_{trainer.global_rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for index, image in enumerate(exception.images[: self.most]):
            file = self.folder / f"{name}_{index:02d}.png"
            with atomic_write(file) as temporary:
                Image.fromarray(image.numpy()).save(temporary, format="PNG")
            lines.append(f"{file.name}: {exception.notes[index]}")
        (self.folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
