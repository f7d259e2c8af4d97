"""The benchmark of the embedded world: which prompts, how many images of each, and how verdicts add up.

The scorer is handed in, so that training and evaluation judge with the same object. As in GenEval (arXiv 2310.11513,
section 3) a task's score is the mean over its images and the overall score is the mean of the tasks, not of the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stage.types import Prompt, Scorer


@dataclass(frozen=True)
class Verdict:
    """What the scorer found in one image: every named part, and in words why."""

    parts: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class ShapesBenchmark:
    """Prompts by split, images per prompt and the part of the score that counts.

    Args:
        name: what reports call it.
        splits: prompts of each split, in file order.
        images_per_prompt: samples drawn for each prompt.
        scorer: judges images `[P, G, H, W, 3]`; must name a part `headline` in [0, 1].
        headline: the part that tables and intervals are about; the other parts are kept beside it.

    Raises ValueError for an empty or repeating split and for less than one image per prompt.
    """

    name: str
    splits: Mapping[str, Sequence[Prompt]]
    images_per_prompt: int
    scorer: Scorer
    headline: str

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise ValueError(
                f"a benchmark needs at least one image per prompt, got {self.images_per_prompt}; "
                "set benchmark.images_per_prompt=1 or more"
            )
        for split, prompts in self.splits.items():
            if not prompts:
                raise ValueError(
                    f"split {split!r} has no prompts; point benchmark.splits.{split} at a prompt file"
                )
            texts = [prompt.text for prompt in prompts]
            if len(set(texts)) < len(texts):
                twice = next(text for text in texts if texts.count(text) > 1)
                raise ValueError(
                    f"prompts of a split must differ, since their images would be equal; {split!r} has {twice!r} "
                    "more than once. Remove the repeated lines and raise images_per_prompt instead."
                )

    def prompts(self, split: str) -> tuple[Prompt, ...]:
        """The prompts of `split`; ValueError names the splits there are."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r}; benchmark {self.name!r} has {', '.join(self.splits)}")
        return tuple(self.splits[split])

    def task(self, prompt: Prompt) -> str:
        """GenEval's tag: the row of the table a prompt belongs to."""
        return str(prompt.metadata.get("tag", "all"))

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Verdict]]:
        """Verdicts `[P][G]` of uint8 images `[P, G, H, W, 3]`."""
        scores = self.scorer(images, prompts)
        if self.headline not in scores.names:
            raise ValueError(
                f"the scorer must name a part {self.headline!r}, it named {', '.join(scores.names)}; "
                "set benchmark.headline to one of these"
            )
        parts = scores.parts.tolist()
        return [
            [
                Verdict(dict(zip(scores.names, values, strict=True)), reason)
                for values, reason in zip(group, reasons, strict=True)
            ]
            for group, reasons in zip(parts, scores.reasons, strict=True)
        ]

    def by_task(self, prompts: Sequence[Prompt], values: Sequence[float]) -> dict[str, np.ndarray]:
        """One value a prompt (the mean over its images) to arrays by task, tasks in order of first appearance."""
        groups: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, values, strict=True):
            groups.setdefault(self.task(prompt), []).append(value)
        return {task: np.asarray(group, dtype=np.float64) for task, group in groups.items()}
