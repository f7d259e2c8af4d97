"""What happens around the updates: validation, pictures, the progress bar, and a clean stop.

Every callback counts in updates (`pl_module.update`, rollouts done), never in Lightning's steps.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch import Tensor

from stage.data import read_prompts
from stage.group_draws import draw
from stage.loggers import log_image, log_table
from stage.objective.advantage import task_rewards
from stage.policy.plans import plan_texts
from stage.types import Metrics, Prompt
from stage.whole_files import atomic_write

STRICT = "strict"  # the reward part that is 1 for an image that shows all that was asked for


def due(update: int, updates: int, every: int) -> bool:
    """Every `every` updates, and after the last one."""
    return update % every == 0 or update >= updates


def check_every(every: int, name: str) -> int:
    """`every`, or ValueError when it is below 1."""
    if every < 1:
        raise ValueError(
            f"{name}.every must be at least 1 update; got {every}. Give a large number for never."
        )
    return every


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    """The prompts in order, at most `size` at a time."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Whatever draws random numbers in here draws the same every time, and the training outside notices nothing."""
    with isolate_rng():
        seed_everything(seed, verbose=False)
        yield


@torch.no_grad()
def draw_images(
    trainer: Trainer, module: Any, policy: Any, prompts: Sequence[Prompt], samples: int, seed: int
) -> Tensor:
    """uint8 images `[P, samples, H, W, 3]` of the policy, with noise that is the same at every update.

    `policy` is what `module.drawing` gives.
    """
    return draw_planned(trainer, module, policy, prompts, samples, seed)[0]


@torch.no_grad()
def draw_planned(
    trainer: Trainer, module: Any, policy: Any, prompts: Sequence[Prompt], samples: int, seed: int
) -> tuple[Tensor, list[list[str]] | None]:
    """The images of `draw_images`, and with reasoning the plan of each, `[P][samples]`."""
    with trainer.precision_plugin.val_step_context():
        _, drawn = draw(policy, module.sampler, prompts, samples, seed=seed, update=0)
        images = policy.decode(drawn.tokens)
        return images, None if drawn.plans is None else plan_texts(policy, drawn.plans)


class Validation(Callback):
    """Scores the same prompts with the same noise every few updates, the base weights included.

    Adds validation/reward (weighted sum of the reward parts, with the weights before any schedule),
    validation/strict and validation/strict/TAG, means over images, to the row of the update. Without a reward part
    named `strict` there is only validation/reward.

    Args:
        prompts: prompt file.
        samples: images a prompt.
        seed: of the sampling noise.
        every: updates between validations.
        prompts_per_batch: prompts sampled at once.
    """

    def __init__(self, *, prompts: str, samples: int, seed: int, every: int, prompts_per_batch: int) -> None:
        self.prompts = read_prompts(prompts)
        self.samples, self.seed, self.prompts_per_batch = samples, seed, prompts_per_batch
        self.every = check_every(every, "callbacks.validation")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.update == 0:
            metrics = self.score(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if due(pl_module.update, pl_module.updates, self.every):
            pl_module.latest |= self.score(trainer, pl_module)

    def score(self, trainer: Trainer, module: Any) -> Metrics:
        """The metrics of the present weights."""
        module.ranks.does("validation")
        with module.drawing() as policy, module.ranks.together(), apart(self.seed):
            values = self._score(trainer, module, policy)
        everywhere: dict[str, list[float]] = defaultdict(list)
        for row in module.ranks.gathered(values):
            for name, found in row.items():
                everywhere[name] += found
        # An exact sum, which does not depend on who scored what.
        return {name: math.fsum(found) / len(found) for name, found in everywhere.items() if found}

    def _score(self, trainer: Trainer, module: Any, policy: Any) -> dict[str, list[float]]:
        """The values of this process's share of the prompts."""
        values: dict[str, list[float]] = defaultdict(list)
        ranks, mine = module.ranks, self.prompts
        if module.draws_alone:
            mine = mine[ranks.rank :: ranks.world]
        for prompts in batches(mine, self.prompts_per_batch):
            images = draw_images(trainer, module, policy, prompts, self.samples, self.seed)
            # Where processes draw together, one that fails would be waited for in the next batch.
            with nullcontext() if module.draws_alone else ranks.together():
                scores = module.scorer(images, prompts)
            values["validation/reward"] += task_rewards(scores).flatten().tolist()
            strict = [i for i, name in enumerate(scores.names) if name.split("/")[-1] == STRICT][:1]
            for prompt, parts in zip(prompts, scores.parts[..., strict].flatten(1), strict=True):
                values["validation/strict"] += parts.tolist()
                values[f"validation/strict/{prompt.metadata.get('tag', 'untagged')}"] += parts.tolist()
        return values


class ImageGrid(Callback):
    """Draws fixed prompts with fixed noise every few updates: `images/update_00020.png`, one row a prompt.

    With reasoning the plans stand in `images/update_00020.txt`, and in a table of the loggers that take one.

    Args:
        folder: where the pictures go.
        prompts: prompt file; `count` of them are taken, spread evenly over the file.
        count: rows of the picture.
        samples: columns of the picture.
        seed: of the sampling noise.
        every: updates between pictures.
    """

    def __init__(self, *, folder: str, prompts: str, count: int, samples: int, seed: int, every: int) -> None:
        found = read_prompts(prompts)
        self.prompts = [
            found[i * len(found) // min(count, len(found))] for i in range(min(count, len(found)))
        ]
        self.folder, self.samples, self.seed = Path(folder), samples, seed
        self.every = check_every(every, "callbacks.images")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.update == 0:
            self.draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if due(pl_module.update, pl_module.updates, self.every):
            self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, module: Any) -> None:
        """Write the picture and show it in the loggers that take pictures."""
        module.ranks.does("pictures")
        with module.drawing() as policy, apart(self.seed):
            if module.draws_alone and not trainer.is_global_zero:
                return
            images, plans = draw_planned(trainer, module, policy, self.prompts, self.samples, self.seed)
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"update_{module.update:05d}.png"
        with atomic_write(path) as temporary:
            grid(images).save(temporary, format="PNG")
        caption = f"update {module.update}: " + " | ".join(prompt.text for prompt in self.prompts)
        log_image(trainer.loggers, "images/grid", path, caption, module.update)
        if plans is not None:
            self._log_plans(trainer, path.with_suffix(".txt"), plans, module.update)

    def _log_plans(self, trainer: Trainer, path: Path, plans: list[list[str]], update: int) -> None:
        rows = [
            (prompt.text, number, plan)
            for prompt, group in zip(self.prompts, plans, strict=True)
            for number, plan in enumerate(group, start=1)
        ]
        with atomic_write(path) as temporary:
            text = "".join(f"{prompt}, {number}: {plan}\n" for prompt, number, plan in rows)
            temporary.write_text(text, encoding="utf-8")
        log_table(trainer.loggers, "images/plans", ("prompt", "sample", "plan"), rows, update)


def grid(images: Tensor) -> Image.Image:
    """uint8 `[P, G, H, W, 3]` as one picture, a row a prompt, with a white line of 2 pixels between
    images.
    """
    padded = torch.nn.functional.pad(images.cpu(), (0, 0, 0, 2, 0, 2), value=255)
    rows, columns, height, width, _ = padded.shape
    picture = padded.permute(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    return Image.fromarray(picture[:-2, :-2].contiguous().numpy())


class Progress(RichProgressBar):
    """Lightning's rich progress bar over updates, with reward, KL, entropy and the time left.

    Where the output is no terminal a bar would be noise or nothing: there it is one line every few updates.

    Args:
        every: updates between lines.
        refresh_rate: redraws a second.
    """

    SHOWN = (("reward", "reward/mean"), ("kl", "policy/kl"), ("entropy", "policy/entropy"))

    def __init__(self, *, every: int, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self.every = check_every(every, "callbacks.progress")
        self.updates = 0
        self.seconds: list[float] = []

    @property
    def total_train_batches(self) -> int:
        return self.updates

    def _get_train_description(self, current_epoch: int) -> str:
        return "update"

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.updates = pl_module.updates
        if not sys.stdout.isatty():
            self.disable()
        super().on_train_start(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        shown = {short: pl_module.latest.get(name) for short, name in self.SHOWN}
        return {short: value for short, value in shown.items() if value is not None}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # After a resume Lightning may count batches from 0 again.
        super().on_train_batch_end(trainer, pl_module, outputs, batch, pl_module.update - 1)
        self.seconds.append(pl_module.latest["time/total"])
        first = len(self.seconds) == 1
        if (
            self.is_disabled
            and trainer.is_global_zero
            and (first or due(pl_module.update, pl_module.updates, self.every))
        ):
            print(self.line(trainer, pl_module), flush=True)

    def line(self, trainer: Trainer, module: Any) -> str:
        """`update 20/120  reward 0.61  kl 0.003  entropy 2.10  0:02:10 left`."""
        recent = self.seconds[-self.every :]
        left = int((module.updates - module.update) * sum(recent) / len(recent))
        metrics = [f"{name} {value:.3f}" for name, value in self.get_metrics(trainer, module).items()]
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        return "  ".join([f"update {module.update}/{module.updates}", *metrics, clock])


class EntropyWatch(Callback):
    """Says once when the entropy reward has been without effect for many updates in a row.

    It compares the best samples of a group, so it is zero where each group has a single best one: rewards that are
    never equal, or groups that are too small.

    Args:
        patience: updates in a row without an active group.
    """

    METRIC = "reward/entropy_active_groups"

    def __init__(self, *, patience: int) -> None:
        self.patience = check_every(patience, "callbacks.entropy_watch")
        self.idle = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.idle = self.idle + 1 if pl_module.latest.get(self.METRIC) == 0 else 0
        if self.idle == self.patience and trainer.is_global_zero:
            print(
                f"warning: the entropy reward did nothing in {self.patience} updates: no group had two samples with "
                "the best reward. Give a reward with ties, a larger group_size, or algorithm.entropy_coefficient=0.",
                file=sys.stderr,
                flush=True,
            )


class CleanStop(Callback):
    """Ctrl-C or SIGTERM: finish the update, save, stop. A Ctrl-C after that abandons the update at once.

    Another SIGTERM changes nothing: a batch system sends one to all processes, and torchrun sends its own on to them.
    Of several processes one that is told is enough.

    `signal_number` says after the run which signal stopped it, None if none did.

    Args:
        seconds: that may pass after the signal; then the update is given up where its rollout or it itself ends, and
            the updates before it are saved. None waits for as long as it takes.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, seconds: float | None) -> None:
        if seconds is not None and (isinstance(seconds, bool) or not seconds >= 0):
            raise ValueError(
                f"callbacks.stop.seconds must be a number of seconds or null; got {seconds!r}. Set it to less than "
                "the time between SIGTERM and SIGKILL."
            )
        self.seconds = seconds
        self.signal_number: int | None = None
        self._told = 0.0
        self._trainer: Trainer | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # Here and not in `setup`: Lightning installs its own handler for SIGTERM just before. When it is torn
        # down it puts back the handlers it found then, so it takes these away as well.
        self._trainer = trainer
        for number in self.SIGNALS:
            signal.signal(number, self._stop)

    def on_rollout(self, module: Any, rollout: Any) -> Metrics:
        """Inside of `Ranks.together`: an error here is one of all processes."""
        self._check_time()
        return {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Processes get a signal at different moments, or one alone does: they stop after the same update.
        told = self.signal_number or 0
        if trainer.world_size > 1:
            told = max(pl_module.ranks.gathered(told))
            if told:
                self.signal_number, trainer.should_stop = told, True
                self._told = self._told or time.monotonic()
        # What was told, and not a signal of this moment, which the others know nothing of.
        if told and not pl_module.update >= pl_module.updates:
            with pl_module.ranks.together():
                self._check_time()

    def _check_time(self) -> None:
        """Raise InterruptedError where too much time has passed since the signal; validation would take more."""
        passed = time.monotonic() - self._told
        if self.signal_number is not None and self.seconds is not None and passed > self.seconds:
            raise InterruptedError(
                f"{signal.Signals(self.signal_number).name} came {passed:.0f} s ago, and callbacks.stop.seconds is "
                f"{self.seconds:g}: what was begun since is given up"
            )

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        assert self._trainer is not None
        if self._trainer.interrupted and number == signal.SIGTERM:
            return  # an error is on its way out, and torchrun sends this because another process has left on it
        self.signal_number, self._told = number, time.monotonic()
        if self._trainer.world_size == 1:
            self._trainer.should_stop = True
        # os.write and not print: a handler may run in the middle of somebody else's print.
        text = f"\n{signal.Signals(number).name}: stopping after this update; Ctrl-C abandons it\n"
        os.write(2, text.encode())
