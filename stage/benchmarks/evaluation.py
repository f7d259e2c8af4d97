"""An evaluation in two stages on disk: draw the images of each model, then score what lies there and add it up.

Base and tuned model go through the same lines, with the same prompts and the same uniforms, so that their difference
is paired.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from stage.benchmarks.benchmark import Benchmark, Verdict
from stage.benchmarks.generate import draw
from stage.benchmarks.images import ImageFolder, Images
from stage.benchmarks.intervals import Bootstrap
from stage.benchmarks.share import WHOLE, Share
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler

Tables = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, or images of another program, whose `load` is never called.

    Args:
        role: `base` or `tuned`; `images` for those of another program that stand alone.
        folder: where its images lie, a subfolder for each split.
        settings: plain values its images depend on; must hold `checkpoint` and `seed`.
        record: what results.json says about it.
        load: reads the weights; called only when images are missing.
    """

    role: str
    folder: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    load: Callable[[], JanusPolicy]


@dataclass(frozen=True)
class Judged:
    """One image with its verdict, a line of `images` in results.json; `file` is an absolute path.

    `plan` is what the model wrote before it, None without reasoning.
    """

    role: str
    split: str
    file: Path
    prompt: str
    prompt_id: int
    index: int
    sample: int
    task: str
    verdict: Verdict
    plan: str | None = None


def open_folders(
    candidate: Candidate, benchmark: Benchmark, splits: Sequence[str] | None
) -> dict[str, ImageFolder]:
    """The image folder of each split.

    Raises ValueError for no split or an unknown one, and for a folder that holds images of other settings.
    """
    return {
        split: ImageFolder(
            candidate.folder / split,
            {**candidate.settings, "split": split},
            benchmark.prompts(split),
            benchmark.images_per_prompt,
        )
        for split in benchmark.chosen(splits)
    }


def draw_missing(
    candidate: Candidate,
    folders: Mapping[str, ImageFolder],
    sampler: Sampler,
    *,
    batch_size: int,
    console: Console,
    share: Share = WHOLE,
) -> dict[str, float]:
    """Stage one: draw what is not there yet; return the number of `images` made and the `seconds` it took.

    The weights are read only if something is missing, and the time does not count the reading.

    Args:
        batch_size: images drawn at once; moves the speed and the memory, not the images.
        share: of the images, for this process; the numbers are those of the share.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least one image, got {batch_size}; 64 suits two cores")
    planned = sum(len(share.of(folder.planned)) for folder in folders.values())
    missing = sum(len(share.of(folder.missing())) for folder in folders.values())
    if not missing:
        console.print(f"{candidate.role}: all {planned} images are there already")
        return {"images": 0, "seconds": 0.0}
    with console.status(f"{candidate.role}: reading the model"):
        policy = candidate.load()
    started = time.perf_counter()
    with _progress(f"{candidate.role}: drawing", planned, planned - missing, console) as advance:
        for folder in folders.values():
            draw(policy, sampler, folder, batch_size=batch_size, drawn=advance, share=share)
    return {"images": missing, "seconds": time.perf_counter() - started}


def score(
    candidate: Candidate,
    folders: Mapping[str, Images],
    benchmark: Benchmark,
    *,
    batch_size: int,
    console: Console,
) -> list[Judged]:
    """Stage two: verdicts on the images that lie in the folders, in the order of their manifests."""
    group, judged = benchmark.images_per_prompt, []
    step = max(1, batch_size // group)
    planned = sum(len(folder.planned) for folder in folders.values())
    with _progress(f"{candidate.role}: scoring", planned, 0, console) as advance:
        for split, folder in folders.items():
            prompts = benchmark.prompts(split)
            for start in range(0, len(prompts), step):
                rows = prompts[start : start + step]
                items = folder.planned[start * group : (start + len(rows)) * group]
                pixels = torch.from_numpy(np.stack([folder.load(item) for item in items]))
                found = benchmark.judge(pixels.unflatten(0, (len(rows), group)), rows)
                verdicts = [verdict for one_prompt in found for verdict in one_prompt]
                judged += [
                    Judged(
                        role=candidate.role,
                        split=split,
                        file=folder.folder / item.file,
                        prompt=item.prompt,
                        prompt_id=item.prompt_id,
                        index=item.index,
                        sample=item.sample,
                        task=benchmark.task(prompts[item.index]),
                        verdict=verdict,
                        plan=folder.load_plan(item),
                    )
                    for item, verdict in zip(items, verdicts, strict=True)
                ]
                advance(len(items))
    return judged


def add_up(
    judged: Sequence[Judged], benchmark: Benchmark, splits: Sequence[str], bootstrap: Bootstrap
) -> dict[str, Tables]:
    """Scores by split, part and task: `{"validation": {"strict": {"colors": {"base": {mean, low, high}, ...}}}}`.

    Each row has one entry a role and, where both are there, `difference`: tuned minus base, paired by prompt; and
    `win_rate` where the benchmark asks for it.
    """
    parts = list(judged[0].verdict.parts)
    return {
        split: {
            part: _table([item for item in judged if item.split == split], benchmark, split, part, bootstrap)
            for part in parts
        }
        for split in splits
    }


def _table(
    judged: Sequence[Judged], benchmark: Benchmark, split: str, part: str, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """The rows of one split and part."""
    prompts = benchmark.prompts(split)
    values = {
        role: _prompt_values([item for item in judged if item.role == role], part, len(prompts))
        for role in dict.fromkeys(item.role for item in judged)
    }
    means = {role: [float(np.mean(group)) for group in groups] for role, groups in values.items()}
    tasks = {role: benchmark.by_task(prompts, found) for role, found in means.items()}
    overall = {role: benchmark.overall(tasks[role], found) for role, found in means.items()}
    columns = {role: bootstrap.table(groups, overall[role]) for role, groups in tasks.items()}
    if {"base", "tuned"} <= columns.keys():
        both = (overall["base"], overall["tuned"])
        columns["difference"] = bootstrap.paired(tasks["base"], tasks["tuned"], both)
        if benchmark.win_rate:
            wins = [win_rate(*pair) for pair in zip(values["base"], values["tuned"], strict=True)]
            rows = benchmark.by_task(prompts, wins)
            columns["win_rate"] = bootstrap.table(rows, benchmark.overall(rows, wins))
    found_rows = next(iter(columns.values()))
    return {task: {column: asdict(table[task]) for column, table in columns.items()} for task in found_rows}


def win_rate(base: Sequence[float], tuned: Sequence[float]) -> float:
    """The share of pairs in which tuned is above base, in [0, 1]; an equal pair counts half."""
    return float(np.mean((np.sign(np.subtract(tuned, base)) + 1) / 2))


def _prompt_values(judged: Sequence[Judged], part: str, prompts: int) -> list[list[float]]:
    """The values of `part` of the images of each prompt, in file order, samples in order."""
    values: list[list[float]] = [[] for _ in range(prompts)]
    for item in sorted(judged, key=lambda item: item.sample):
        values[item.index].append(item.verdict.parts[part])
    return values


class _Speed(ProgressColumn):
    """Images a second of the work done in this run."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} images/s", style="progress.data.speed")


@contextmanager
def _progress(title: str, total: int, done: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar with images, speed and time left; yields the function that moves it."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done)
        yield lambda images: progress.advance(task, images)
