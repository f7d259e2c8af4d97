"""Several scorers as one: their parts side by side, under the names the configuration gives the scorers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stage.score_checks import UnusableScores, check_values
from stage.types import ChecksPrompts, Prompt, Scorer, Scores

ANY = (-math.inf, math.inf)  # the range of a part whose scorer states none


class Combine:
    """Runs every scorer on the same images and sets their parts side by side.

    Part `p` of scorer `n` becomes `n/p`, its weight is multiplied by `weights[n]`. Nothing is normalised or
    added up here; that is the objective's business.

    Args:
        scorers: name to scorer, in the order of the parts.
        weights: name to weight, for exactly these names. A weight of 0 logs the scorer only.
    """

    def __init__(self, scorers: Mapping[str, Scorer], weights: Mapping[str, float]) -> None:
        if not scorers:
            raise ValueError("a combined reward needs at least one scorer, got none; name one under scorers")
        if set(scorers) != set(weights):
            raise ValueError(
                f"every scorer has one weight, got weights without a scorer "
                f"{sorted(set(weights) - set(scorers))} and scorers without a weight "
                f"{sorted(set(scorers) - set(weights))}; make the two lists of names equal"
            )
        for name, scorer in scorers.items():
            if not name or "/" in name:
                raise ValueError(f"a scorer's name is a non-empty word without '/', got {name!r}; rename it")
            if not isinstance(scorer, Scorer):
                raise ValueError(
                    f"a scorer is called with (images, prompts), got {scorer!r} for {name!r}; give one"
                )
            if not math.isfinite(weights[name]):
                raise ValueError(f"weights are finite numbers, got {weights[name]!r} for {name!r}; use one")
        self.scorers = dict(scorers)
        self.weights = {name: float(weights[name]) for name in scorers}

    @property
    def provenance(self) -> dict[str, Any]:
        """What results record of each scorer that has weights, by its name."""
        found = {name: getattr(scorer, "provenance", None) for name, scorer in self.scorers.items()}
        return {name: dict(record) for name, record in found.items() if record is not None}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt that one of the scorers cannot score, with the scorer's name."""
        for name, scorer in self.scorers.items():
            if isinstance(scorer, ChecksPrompts):
                try:
                    scorer.check(prompts)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to the parts of all scorers `[P, G, R]`.

        Raises:
            ValueError: a scorer failed or did not give finite parts for every image; it says which one.
        """
        found = {name: self._score(name, images, prompts) for name in self.scorers}
        return Scores(
            parts=torch.cat([s.parts.to(images.device, torch.float32) for s in found.values()], dim=-1),
            names=tuple(f"{name}/{part}" for name, scores in found.items() for part in scores.names),
            weights=tuple(self.weights[name] * weight for name, s in found.items() for weight in s.weights),
            reasons=tuple(
                tuple(
                    "; ".join(f"{name}: {scores.reasons[p][g]}" for name, scores in found.items())
                    for g in range(images.shape[1])
                )
                for p in range(images.shape[0])
            ),
            ranges=tuple(limits for s in found.values() for limits in s.ranges or (ANY,) * len(s.names)),
        )

    def _score(self, name: str, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """The scores of one scorer, checked against the images they are for."""
        try:
            scores = self.scorers[name](images, prompts)
        except UnusableScores:  # of a combination inside this one; it carries the images
            raise
        except Exception as error:
            raise ValueError(
                f"the scorer {name!r} failed, and no reward is made up for it: {error}"
            ) from error
        expected = (*images.shape[:2], len(scores.names))
        if tuple(scores.parts.shape) != expected or len(scores.weights) != len(scores.names):
            raise ValueError(
                f"parts are [P, G, R] with R names and R weights: {name!r} gave {tuple(scores.parts.shape)}, "
                f"{scores.names} and {scores.weights} for {tuple(images.shape[:2])} images; repair the scorer"
            )
        if [len(group) for group in scores.reasons] != [images.shape[1]] * images.shape[0]:
            raise ValueError(
                f"every image has one reason, as [P][G]: {name!r} gave {scores.reasons!r}; repair the scorer"
            )
        check_values(scores, images, prompts, repr(name))
        return scores
