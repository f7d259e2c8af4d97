"""Stage one of an evaluation: what is evaluated, and drawing the images of each model that are not on disk yet.

Base and tuned model go through the same lines, with the same prompts and the same uniforms, so that their difference
is paired.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from stage.benchmarks.adopt import adopt
from stage.benchmarks.benchmark import Benchmark, Verdict
from stage.benchmarks.generate import draw
from stage.benchmarks.images import ImageFolder, Images, Planned
from stage.benchmarks.share import WHOLE, Share
from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate, or images of another program, whose `load` is never called.

    Args:
        role: `base` or `tuned`; `images` for those of another program that stand alone.
        folder: where its images lie, a subfolder for each split.
        settings: plain values its images depend on; must hold `checkpoint` and `seed`.
        record: what results.json says about it.
        load: reads the weights; called only when images are missing.
        pool: holds the folders of this model's other benchmarks, whose images serve here where they are the same; None
            for a folder that stands alone.
    """

    role: str
    folder: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any]
    load: Callable[[], JanusPolicy]
    pool: Path | None = None


@dataclass(frozen=True)
class Judged:
    """One image with its verdict, a line of `images` in results.json; `file` is an absolute path.

    `rows` are the rows of the table that it counts in, the first of them its `task`. `plan` is what the model wrote
    before it, None without reasoning.
    """

    role: str
    split: str
    file: Path
    prompt: str
    prompt_id: int
    index: int
    sample: int
    rows: tuple[str, ...]
    verdict: Verdict
    plan: str | None = None

    @property
    def task(self) -> str:
        return self.rows[0]


def judged_image(
    candidate: Candidate, split: str, images: Images, item: Planned, benchmark: Benchmark, verdict: Verdict
) -> Judged:
    """The line of an image of `split` that got `verdict`."""
    return Judged(
        role=candidate.role,
        split=split,
        file=images.folder / item.file,
        prompt=item.prompt,
        prompt_id=item.prompt_id,
        index=item.index,
        sample=item.sample,
        rows=tuple(benchmark.rows(benchmark.prompts(split)[item.index])),
        verdict=verdict,
        plan=images.load_plan(item),
    )


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
            benchmark.keeps_tokens,
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
    """Stage one: draw what is not there yet, nor in the `pool`.

    Returns the number of `images` made and the `seconds` it took.
    The weights are read only if something is missing, and the time does not count the reading.

    Args:
        batch_size: images drawn at once; moves the speed and the memory, not the images.
        share: of the images, for this process; the numbers are those of the share.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least one image, got {batch_size}; 64 suits two cores")
    planned = sum(len(share.of(folder.planned)) for folder in folders.values())
    adopted = 0
    if candidate.pool is not None:
        adopted = sum(
            adopt(folder, candidate.pool, share.of(folder.missing())) for folder in folders.values()
        )
    if adopted:
        console.print(f"{candidate.role}: {adopted} images are another benchmark's of the same prompts")
    missing = sum(len(share.of(folder.missing())) for folder in folders.values())
    if not missing:
        console.print(f"{candidate.role}: all {planned} images are there already")
        return {"images": 0, "seconds": 0.0}
    with console.status(f"{candidate.role}: reading the model"):
        policy = candidate.load()
    started = time.perf_counter()
    with progress(f"{candidate.role}: drawing", planned, planned - missing, console) as advance:
        for folder in folders.values():
            draw(policy, sampler, folder, batch_size=batch_size, drawn=advance, share=share)
    return {"images": missing, "seconds": time.perf_counter() - started}


class _Speed(ProgressColumn):
    """Images a second of the work done in this run."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f} images/s", style="progress.data.speed")


@contextmanager
def progress(title: str, total: int, done: int, console: Console) -> Iterator[Callable[[int], None]]:
    """A bar with images, speed and time left; yields the function that moves it."""
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda images: bar.advance(task, images)
