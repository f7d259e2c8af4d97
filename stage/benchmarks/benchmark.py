"""A benchmark: which prompts, how many images of each, who judges, and how verdicts add up.

The scorer is handed in, so that training and evaluation judge with the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from stage.benchmarks.published import Published
from stage.types import Prompt, Scorer

Rows = Callable[[Prompt], Sequence[str]]


@dataclass(frozen=True)
class Verdict:
    """What the scorer found in one image: every named part, and in words why."""

    parts: Mapping[str, float]
    reason: str


@dataclass(frozen=True)
class Benchmark:
    """Prompts by split, images per prompt and the parts of the score that count.

    Args:
        name: what reports call it, and the folder of its results.
        splits: prompts of each split, in file order.
        images_per_prompt: samples drawn for each prompt.
        scorer: judges images `[P, G, H, W, 3]`; must name a part `headline`. None only draws.
        headline: the part that tables and intervals are about; the other parts are kept beside it.
        beside: other parts that get a table of their own.
        rows: the rows of the table that a prompt counts in; see `stage.benchmarks.categories`.
        macro: the overall score is the mean of the rows (GenEval, arXiv 2310.11513, section 3), else of the prompts.
        win_rate: the table also says how often the tuned model's image beats the base's of the same prompt and seed.
        published: numbers from papers to lay beside ours, None for none.

    Raises ValueError for an empty or repeating split and for less than one image per prompt.
    """

    name: str
    splits: Mapping[str, Sequence[Prompt]]
    images_per_prompt: int
    scorer: Scorer | None
    headline: str
    beside: Sequence[str]
    rows: Rows
    macro: bool
    win_rate: bool
    published: Published | None

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
            texts = [self.identity(prompt) for prompt in prompts]
            if len(set(texts)) < len(texts):
                twice = next(text[0] for text in texts if texts.count(text) > 1)
                raise ValueError(
                    f"prompts of a split must differ, since their images would be equal; {split!r} has {twice!r} "
                    "more than once. Remove the repeated lines and raise images_per_prompt instead."
                )

    @property
    def subfolder(self) -> str:
        """The folder of its images and results inside that of the evaluated model."""
        return self.name

    @property
    def keeps_tokens(self) -> bool:
        """Whether the tokens of its images are kept beside them."""
        return False

    @property
    def draws(self) -> bool:
        """Whether it is about images that models draw."""
        return True

    def check_models(self, sampler: Mapping[str, Any]) -> None:
        """Raise ValueError for models or a sampler, by its configuration, that it cannot evaluate."""

    def identity(self, prompt: Prompt) -> tuple[str, ...]:
        """What no two prompts of a split may have in common: the text first."""
        return (prompt.text, *self.rows(prompt))

    def prompts(self, split: str) -> tuple[Prompt, ...]:
        """The prompts of `split`; ValueError names the splits there are."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r}; benchmark {self.name!r} has {', '.join(self.splits)}")
        return tuple(self.splits[split])

    def chosen(self, splits: Sequence[str] | None) -> list[str]:
        """The splits that were asked for, all for None. ValueError for none and for an unknown one."""
        names = list(self.splits) if splits is None else list(splits)
        if not names:
            raise ValueError(
                f"an evaluation needs at least one of {', '.join(self.splits)}; "
                f"give splits=[{next(iter(self.splits))}]"
            )
        for name in names:
            self.prompts(name)
        return names

    def task(self, prompt: Prompt) -> str:
        """The first row of the table that a prompt counts in."""
        return self.rows(prompt)[0]

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Verdict]]:
        """Verdicts `[P][G]` of uint8 images `[P, G, H, W, 3]`."""
        assert self.scorer is not None
        scores = self.scorer(images, prompts)
        unknown = [name for name in (self.headline, *self.beside) if name not in scores.names]
        if unknown:
            raise ValueError(
                f"the scorer must name a part {unknown[0]!r}, it named {', '.join(scores.names)}; "
                f"set benchmark.{'headline' if unknown[0] == self.headline else 'beside'} to one of these"
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
        """One value a prompt (the mean over its images) to arrays by row, rows in order of first appearance."""
        groups: dict[str, list[float]] = {}
        for prompt, value in zip(prompts, values, strict=True):
            for row in self.rows(prompt):
                groups.setdefault(row, []).append(value)
        return {row: np.asarray(group, dtype=np.float64) for row, group in groups.items()}

    def overall(self, groups: Mapping[str, np.ndarray], values: Sequence[float]) -> list[np.ndarray]:
        """The groups whose means are averaged to the overall score: the rows, or all prompts as one."""
        return list(groups.values()) if self.macro else [np.asarray(values, dtype=np.float64)]
