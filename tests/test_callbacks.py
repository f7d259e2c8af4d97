"""Validation, pictures, checkpoints, progress and the clean stop, all counted in updates."""

from __future__ import annotations

import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from stage.callbacks import CleanStop, EntropyWatch, ImageGrid, Progress, Validation, grid
from stage.checkpoints import Checkpoints
from stage.group_draws import draw
from stage.loggers import MetricsFile, best_by, read_metrics
from stage.module import StageModule
from stage.training_checkpoint import read_training_checkpoint
from stage.whole_files import atomic_write
from tests.tiny_training import (
    PROMPTS,
    Redness,
    objective,
    same,
    tiny_base,
    tiny_module,
    tiny_trainer,
    weights,
    write_prompts,
)

# Nothing moves: what a callback finds at one update it must find at every other.
STILL = {"optimizer": partial(torch.optim.SGD, lr=0.0)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All five prompts; the tags are those of PROMPTS."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", PROMPTS)


def validation(prompt_file: str, **changes: Any) -> Validation:
    arguments: dict[str, Any] = {
        "prompts": prompt_file,
        "samples": 2,
        "seed": 9,
        "every": 2,
        "prompts_per_batch": 2,
    }
    return Validation(**(arguments | changes))


def pictures(folder: Path, prompt_file: str, **changes: Any) -> ImageGrid:
    arguments: dict[str, Any] = {
        "folder": str(folder / "images"),
        "prompts": prompt_file,
        "count": 2,
        "samples": 3,
        "seed": 9,
        "every": 2,
    }
    return ImageGrid(**(arguments | changes))


def checkpoints(folder: Path, **changes: Any) -> Checkpoints:
    arguments: dict[str, Any] = {
        "folder": str(folder / "checkpoints"),
        "every": 2,
        "keep": 1,
        "beside_training": False,
        "monitor": "validation/strict",
    }
    return Checkpoints(**(arguments | changes))


def fit(
    folder: Path, module: StageModule, callbacks: Sequence[Callback], resume: Path | None = None
) -> StageModule:
    tiny_trainer(folder, callbacks, [MetricsFile(folder)]).fit(module, ckpt_path=resume, weights_only=True)
    return module


def test_validation_is_the_mean_over_prompts_and_samples(
    base: Path, tmp_path: Path, prompt_file: str
) -> None:
    """Prompts in batches of two against a loop over single images; two of the five prompts are tagged counting."""
    scorer = Redness()
    module = fit(tmp_path, tiny_module(base, **STILL), [validation(prompt_file)])
    policy: Any = module.policy
    red, strict = [], []
    for prompt in PROMPTS:
        _, drawn = draw(policy, module.sampler, [prompt], 2, seed=9, update=0)
        parts = scorer(policy.decode(drawn.tokens), [prompt]).parts[0]
        red.append(parts[:, 0].mean().item())
        strict.append(parts[:, 1].mean().item())
    rows = {row["update"]: row for row in read_metrics(tmp_path / "metrics.csv")}
    assert sorted(rows) == ["0", "1", "2", "3"] and "validation/reward" not in rows["1"]
    for update in ("0", "2", "3"):  # the base, every second, the last
        found = {name: float(value) for name, value in rows[update].items()}
        assert found["validation/reward"] == pytest.approx(sum(red) / 5, abs=1e-6)
        assert found["validation/strict"] == pytest.approx(sum(strict) / 5)
        assert found["validation/strict/counting"] == pytest.approx((strict[1] + strict[3]) / 2)
        assert found["validation/strict/single_object"] == pytest.approx(
            (strict[0] + strict[2] + strict[4]) / 3
        )


def test_validation_follows_the_weights(base: Path, tmp_path: Path, prompt_file: str) -> None:
    fit(tmp_path, tiny_module(base, updates=1), [validation(prompt_file)])
    first, last = (float(row["validation/reward"]) for row in read_metrics(tmp_path / "metrics.csv"))
    assert first != last


def test_without_a_strict_part_there_is_only_the_reward(base: Path, tmp_path: Path, prompt_file: str) -> None:
    class Plain(Redness):
        def __call__(self, images: Any, prompts: Any) -> Any:
            scores = super().__call__(images, prompts)
            return type(scores)(scores.parts[..., :1], scores.names[:1], scores.weights[:1], scores.reasons)

    module = fit(tmp_path, tiny_module(base, scorer=Plain(), updates=1), [validation(prompt_file)])
    assert [name for name in module.latest if name.startswith("validation")] == ["validation/reward"]


def test_a_grid_has_a_row_a_prompt_and_a_white_line_between(tmp_path: Path) -> None:
    """Images of one value each: pixel (y, x) of image (p, g) stands at (p * 6 + y, g * 6 + x) for 4 x 4 images."""
    images = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 4, 4, 3) * 40
    picture = np.asarray(grid(images))
    assert picture.shape == (10, 16, 3)
    for prompt in range(2):
        for sample in range(3):
            corner = picture[prompt * 6 : prompt * 6 + 4, sample * 6 : sample * 6 + 4]
            assert (corner == (prompt * 3 + sample) * 40).all()
    assert (picture[4:6] == 255).all() and (picture[:, 4:6] == 255).all()


def test_pictures_show_the_same_prompts_with_the_same_noise(
    base: Path, tmp_path: Path, prompt_file: str
) -> None:
    fit(tmp_path, tiny_module(base, **STILL), [pictures(tmp_path, prompt_file)])
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"update_0000{update}.png" for update in (0, 2, 3)]
    first, *others = (np.asarray(Image.open(file)) for file in files)
    assert all((first == other).all() for other in others)
    assert first.shape == (2 * 18 - 2, 3 * 18 - 2, 3)


def test_rows_are_spread_over_the_prompt_file(tmp_path: Path, prompt_file: str) -> None:
    """Of five prompts, two rows are prompts 0 and 2; more rows than prompts are all of them."""
    assert not list((tmp_path / "images").glob("*.txt"))  # nothing was planned
    assert pictures(tmp_path, prompt_file, count=2).prompts[1].text == PROMPTS[2].text
    assert [p.text for p in pictures(tmp_path, prompt_file, count=9).prompts] == [p.text for p in PROMPTS]


class Score(Callback):
    """Plays a validation that finds the given scores, one an update."""

    def __init__(self, *scores: float | None, name: str = "validation/strict") -> None:
        self.scores, self.name = scores, name

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        score = self.scores[pl_module.update - 1]
        if score is not None:
            pl_module.latest[self.name] = score


def test_best_is_the_highest_score_and_last_the_last(base: Path, tmp_path: Path) -> None:
    """Scores .2, .6, none, .6: the second stands, since the fourth is no better."""
    fit(tmp_path, tiny_module(base, updates=4), [checkpoints(tmp_path, every=3), Score(0.2, 0.6, None, 0.6)])
    folder = tmp_path / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert read_training_checkpoint(folder / "best.ckpt")["update"] == 2
    assert read_training_checkpoint(folder / "last.ckpt")["update"] == 4


def test_a_reward_without_a_strict_part_has_a_best_checkpoint_too(base: Path, tmp_path: Path) -> None:
    played = Score(0.2, 0.6, 0.4, name="validation/reward")
    fit(tmp_path, tiny_module(base, updates=3), [checkpoints(tmp_path, every=3), played])
    assert read_training_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["update"] == 2


@pytest.mark.parametrize(
    ("row", "monitor", "found"),
    [
        ({"validation/strict": 0.1, "validation/reward": 0.9}, "validation/strict", 0.1),
        ({"validation/reward": 0.9}, "validation/strict", 0.9),
        ({"validation/reward": 0.9}, "reward/mean", None),
        ({"reward/mean": 0.9}, "validation/strict", None),
    ],
)
def test_what_the_best_checkpoint_is_chosen_by(
    row: dict[str, float], monitor: str, found: float | None
) -> None:
    assert best_by(row, monitor) == found


def test_best_is_remembered_over_a_resume(base: Path, tmp_path: Path) -> None:
    keep = checkpoints(tmp_path, every=1)
    fit(tmp_path, tiny_module(base, updates=2), [keep, Score(0.9, 0.1)])
    again = checkpoints(tmp_path, every=1)
    fit(tmp_path, tiny_module(base, updates=3), [again, Score(0.9, 0.1, 0.5)], resume=keep.last)
    assert again.best_score == 0.9
    assert read_training_checkpoint(tmp_path / "checkpoints" / "best.ckpt")["update"] == 1


def test_a_write_that_fails_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"former")
    with pytest.raises(OSError, match="no space"), atomic_write(path) as temporary:
        temporary.write_bytes(b"half of a che")
        raise OSError("no space left")
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error_before_work_starts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    module = tiny_module(base)
    with pytest.raises(OSError, match=r"checkpoints need .* MB, .* has 0 MB free"):
        fit(tmp_path, module, [checkpoints(tmp_path)])
    assert module.update == 0


class Send(Callback):
    """Sends this process a signal, once or more, while an update runs."""

    def __init__(self, update: int, *signals: signal.Signals) -> None:
        self.update, self.signals = update, signals

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.update == self.update:
            for number in self.signals:
                os.kill(os.getpid(), number)


def resumable(base: Path) -> StageModule:
    return tiny_module(base, scorer=Redness(noise=0.3), objective=objective("stage"), updates=4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_update_and_saves(base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The signal comes during the second update; resumed, the run ends where an uninterrupted one does."""
    torch.manual_seed(1)
    whole = fit(tmp_path / "whole", resumable(base), [])
    stop, keep = CleanStop(seconds=None), checkpoints(tmp_path, every=100)
    torch.manual_seed(1)
    module = fit(tmp_path, resumable(base), [stop, keep, Send(1, number)])
    assert stop.signal_number == number and module.update == keep.saved_update == 2
    assert signal.getsignal(number) != stop._stop
    torch.manual_seed(2)
    again = fit(tmp_path, resumable(base), [CleanStop(seconds=None), checkpoints(tmp_path)], resume=keep.last)
    assert again.update == 4 and same(weights(again), weights(whole))
    assert [row["update"] for row in read_metrics(tmp_path / "metrics.csv")] == ["1", "2", "3", "4"]


def test_a_signal_before_the_first_update_is_resumable_too(
    base: Path, tmp_path: Path, prompt_file: str
) -> None:
    """It comes during the validation of the base weights: no update is made, update 0 is saved."""

    class Early(Redness):
        def __call__(self, images: Any, prompts: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            return Redness.__call__(self, images, prompts)

    keep = checkpoints(tmp_path)
    once = validation(prompt_file, prompts_per_batch=5)
    module = fit(tmp_path, tiny_module(base, scorer=Early()), [CleanStop(seconds=None), once, keep])
    assert module.update == keep.saved_update == 0
    again = fit(
        tmp_path, tiny_module(base), [validation(prompt_file), checkpoints(tmp_path)], resume=keep.last
    )
    assert again.update == 3
    assert [row["update"] for row in read_metrics(tmp_path / "metrics.csv")] == ["0", "1", "2", "3"]


def test_a_second_signal_abandons_the_update(base: Path, tmp_path: Path) -> None:
    keep = checkpoints(tmp_path, every=1)
    module = tiny_module(base)
    with pytest.raises(SystemExit):
        fit(tmp_path, module, [CleanStop(seconds=None), keep, Send(2, signal.SIGINT, signal.SIGINT)])
    assert module.update == keep.saved_update == read_training_checkpoint(keep.last)["update"] == 2


@pytest.mark.parametrize("signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_sigterm_does_not_abandon_the_update(base: Path, tmp_path: Path, signals: Any) -> None:
    """srun sends one to every process, and torchrun sends its own on to them."""
    keep, stop = checkpoints(tmp_path, every=100), CleanStop(seconds=None)
    module = fit(tmp_path, tiny_module(base), [stop, keep, Send(1, *signals)])
    assert stop.signal_number == signals[0]
    assert module.update == keep.saved_update == read_training_checkpoint(keep.last)["update"] == 2


@pytest.mark.parametrize("at_end", [False, True])
def test_an_update_that_takes_too_long_after_a_signal_is_given_up(
    base: Path, tmp_path: Path, at_end: bool
) -> None:
    """No time at all: the rollout of the third update is the last; told during learning, the update is."""

    class Late(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            if module.update == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    keep, late = checkpoints(tmp_path, every=100), Late() if at_end else Send(2, signal.SIGTERM)
    module = tiny_module(base)
    with pytest.raises(InterruptedError, match=r"SIGTERM came 0 s ago, and callbacks\.stop\.seconds is 0"):
        fit(tmp_path, module, [CleanStop(seconds=0), late, keep])
    assert module.update == keep.saved_update == read_training_checkpoint(keep.last)["update"] == 2
    again = fit(tmp_path, tiny_module(base), [checkpoints(tmp_path)], resume=keep.last)
    assert again.update == 3
    with pytest.raises(ValueError, match=r"stop\.seconds must be a number of seconds or null; got -1"):
        CleanStop(seconds=-1)


def test_the_line_of_progress_says_what_is_left() -> None:
    """40 of 100 updates at 2 s each: 2 minutes left."""
    progress = Progress(every=5, refresh_rate=4)
    progress.seconds = [9.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    latest = {"reward/mean": 0.5, "policy/kl": 0.01, "policy/entropy": 2.5, "reward/std": 1.0}
    module: Any = SimpleNamespace(update=40, updates=100, latest=latest)
    line = progress.line(SimpleNamespace(), module)  # type: ignore[arg-type]
    assert line == "update 40/100  reward 0.500  kl 0.010  entropy 2.500  0:02:00 left"


def test_progress_is_printed_where_there_is_no_terminal(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, [Progress(every=2, refresh_rate=4)])
    trainer.fit(tiny_module(base, updates=3))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["update 1/3", "update 2/3", "update 3/3"]


def test_an_entropy_reward_without_effect_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch, trainer = EntropyWatch(patience=3), SimpleNamespace(is_global_zero=True)

    def after(*shares: float | None) -> str:
        for share in shares:
            latest = {} if share is None else {EntropyWatch.METRIC: share}
            watch.on_train_batch_end(trainer, SimpleNamespace(latest=latest), None, None, 0)  # type: ignore[arg-type]
        return capsys.readouterr().err

    assert after(0.0, 0.0, 0.1, 0.0, 0.0) == ""  # three in all, never three in a row
    assert "did nothing in 3 updates" in after(0.0)
    assert after(0.0, 0.0, 0.0) == ""
    watch = EntropyWatch(patience=1)
    assert after(None, None) == ""  # the switch is off: there is no such metric


@pytest.mark.parametrize(
    "make", [validation, partial(pictures, Path()), lambda file, **c: checkpoints(Path(), **c)]
)
def test_never_is_not_every_zero(make: Any, prompt_file: str) -> None:
    with pytest.raises(ValueError, match="every must be at least 1 update; got 0"):
        make(prompt_file, every=0)


def test_a_save_that_fails_leaves_the_former_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of the second save, and when the error asks for another."""
    save, saves = torch.save, []

    def full(content: Any, file: Any) -> None:
        saves.append(file)
        save(content, file)
        if len(saves) >= 2:
            file.truncate(1000)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    keep = checkpoints(tmp_path, every=1)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, tiny_module(base), [keep])
    assert read_training_checkpoint(keep.last)["update"] == 1
    assert list(keep.folder.iterdir()) == [keep.last]


def test_a_signal_between_two_exchanges_is_told_at_the_next_one() -> None:
    """Else this process would come to an exchange of its own, and wait in it for ever."""
    stop = CleanStop(seconds=240)
    trainer = SimpleNamespace(world_size=2, should_stop=False, interrupted=False)
    stop._trainer = trainer  # type: ignore[assignment]

    def gathered(value: int) -> list[int]:
        stop._stop(signal.SIGTERM, None)
        return [value, 0]

    ranks = SimpleNamespace(gathered=gathered)  # without `together`, which the other process does not come to
    module = SimpleNamespace(ranks=ranks, update=1, updates=9)
    stop.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    assert not trainer.should_stop
    ranks.gathered, ranks.together = lambda value: [value, 0], nullcontext
    stop.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    assert trainer.should_stop
