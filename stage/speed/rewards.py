"""Seconds of rewards over a rollout's images, beside the one-by-one loop of the release, on random weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stage.rewards.gdino import GDinoReward
from stage.speed.machine import peak_gibibytes, seconds
from stage.speed.plain_scores import plain_gdino, plain_git, plain_hps
from stage.speed.scorers import GROUP, PROMPTS, build_gdino, build_git, build_hps, lower_threshold, pictures

Row = dict[str, float | str]
# How each is built, its loop, and its dtype on a GPU: that of conf/reward.
REWARDS: dict[str, tuple[Callable[..., Any], Callable[..., list[float]], str]] = {
    "hps": (build_hps, plain_hps, "float16"),
    "git": (build_git, plain_git, "float16"),
    "gdino": (build_gdino, plain_gdino, "float32"),
}
SIDE = 384  # of the images, as Janus-Pro makes them
REPEATS = 3


def measure_rewards(names: Sequence[str], images: int, device: torch.device, tiny: bool) -> list[Row]:
    """A row of `measure_reward` for each of `names`."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure_reward(name, Path(folder), images, device, tiny))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def measure_reward(name: str, folder: Path, images: int, device: torch.device, tiny: bool) -> Row:
    """Median seconds of a reward and of its loop, after one call of each, and how far their scores are apart.

    Args:
        name: of `REWARDS`.
        folder: for the random weights.
        images: of one call, a multiple of 8.
        tiny: small shapes, to try the path.
    """
    build, plain, half = REWARDS[name]
    dtype = half if device.type == "cuda" else "float32"
    scorer = build(folder, str(device), dtype, tiny)
    shown, prompts = pictures(images, SIDE), PROMPTS[: images // GROUP]
    boxes = float("nan")
    if isinstance(scorer, GDinoReward):
        lower_threshold(scorer, shown, prompts)
    ours = scorer(shown, prompts)
    if isinstance(scorer, GDinoReward):
        boxes = float(min(_boxes(reason) for row in ours.reasons for reason in row))
    theirs = torch.tensor(plain(scorer, shown, prompts)).view(ours.parts.shape[:2])
    # A copy each time: a tower remembers the tensor that it saw last.
    taken = [seconds(lambda: scorer(shown.clone(), prompts), device) for _ in range(REPEATS)]
    peak = peak_gibibytes(lambda: scorer(shown.clone(), prompts), device)
    loop = [seconds(lambda: plain(scorer, shown, prompts), device) for _ in range(REPEATS)]
    return {
        "reward": name,
        "images": images,
        "dtype": dtype,
        "seconds": median(taken),
        "loop_seconds": median(loop),
        "times": median(loop) / median(taken),
        "largest_difference": float((ours.parts[..., 0] - theirs).abs().max()),
        "fewest_boxes": boxes,
        "peak_gib": peak,
    }


def _boxes(reason: str) -> int:
    """The boxes that a reason of gdino counts, like `boxes: cat 5, dog 3`."""
    return sum(int(count) for count in re.findall(r" (\d+)(?=,|$)", reason))
