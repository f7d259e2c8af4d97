"""One scorer for each kind of prompt, such as T2I-CompBench's categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stage.rewards import members
from stage.types import Prompt, Scorer, Scores


class ByCategory:
    """Scores every prompt with the scorer of its category; the one part `score` is the weighted sum of its parts.

    Args:
        key: of the prompt's metadata, which names the category.
        categories: category to the name of its scorer; several may share one.
        scorers: name to scorer.

    Raises:
        ValueError: for a prompt of another category.
    """

    def __init__(self, key: str, categories: Mapping[str, str], scorers: Mapping[str, Scorer]) -> None:
        if set(categories.values()) != set(scorers):
            raise ValueError(
                f"categories name the scorers that there are, got {dict(categories)} and {list(scorers)}; make the "
                "names equal"
            )
        self.key, self.categories, self.scorers = key, dict(categories), dict(scorers)

    @property
    def provenance(self) -> dict[str, Any]:
        """What results record of each scorer that has weights, by its name."""
        return members.provenance(self.scorers)

    @property
    def compares_group(self) -> bool:
        """Whether one of the scorers compares the images of a prompt."""
        return any(members.compares_group(scorer) for scorer in self.scorers.values())

    def self_check(self) -> None:
        """Raises ValueError where one of the scorers does not know its answers, with the scorer's name."""
        members.self_check(self.scorers)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt without a scorer, or that its scorer cannot score."""
        for category, rows in self._rows(prompts).items():
            members.check(self.scorers[self.categories[category]], [prompts[row] for row in rows], category)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`."""
        values = torch.zeros(images.shape[:2], device=images.device)
        reasons: list[tuple[str, ...]] = [() for _ in prompts]
        for category, rows in self._rows(prompts).items():
            scores = self.scorers[self.categories[category]](images[rows], [prompts[row] for row in rows])
            weights = torch.tensor(scores.weights, device=scores.parts.device)
            values[rows] = (scores.parts.float() @ weights).to(values.device)
            for row, reason in zip(rows, scores.reasons, strict=True):
                reasons[row] = reason
        return Scores(values.unsqueeze(-1), ("score",), (1.0,), tuple(reasons))

    def _rows(self, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
        """The places of the prompts of each category."""
        found: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            category = str(prompt.metadata.get(self.key))
            if category not in self.categories:
                raise ValueError(
                    f"there are scorers for the {self.key} {', '.join(self.categories)}, {prompt.text!r} has "
                    f"{category!r}; add one, or leave these prompts out"
                )
            found.setdefault(category, []).append(row)
        return found
