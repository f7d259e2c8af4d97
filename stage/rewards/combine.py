"""Several scorers as one: their parts side by side, under the names the configuration gives the scorers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from stage.rewards import members
from stage.score_checks import UnusableScores, check_values
from stage.types import Prompt, Scorer, Scores


class Gate(Protocol):
    """Says in which images something counts, by the values `[P, G]` of the part that it names."""

    @property
    def part(self) -> str: ...

    def __call__(self, values: Tensor) -> Tensor: ...


ANY = (-math.inf, math.inf)  # the range of a part whose scorer states none


class Combine:
    """Runs every scorer on the same images and sets their parts side by side.

    Part `p` of scorer `n` becomes `n/p`, its weight is multiplied by `weights[n]`. Nothing is normalised or
    added up here; that is the objective's business.

    Args:
        scorers: name to scorer, in the order of the parts.
        weights: name to weight, for exactly these names. A weight of 0 logs the scorer only.
        gates: name to the condition, on a part of the combination, under which that scorer counts in an image; see
            `stage.rewards.terms.Above`. Scorers without one always count.
        schedules: name to the factor of its weight as a function of the update; see `stage.rewards.terms`. Scorers
            without one keep their weight.
    """

    def __init__(
        self,
        scorers: Mapping[str, Scorer],
        weights: Mapping[str, float],
        gates: Mapping[str, Gate] | None = None,
        schedules: Mapping[str, Callable[[int], float]] | None = None,
    ) -> None:
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
        for kind, terms in (("gates", gates or {}), ("schedules", schedules or {})):
            if set(terms) - set(scorers):
                raise ValueError(
                    f"{kind} belong to scorers of the combination, got {sorted(set(terms) - set(scorers))}, scorers "
                    f"are {', '.join(scorers)}; choose of these"
                )
        self.gates, self.schedules = dict(gates or {}), dict(schedules or {})
        self.scorers = dict(scorers)
        self.weights = {name: float(weights[name]) for name in scorers}

    @property
    def provenance(self) -> dict[str, Any]:
        """What results record of each scorer that has weights, by its name."""
        return members.provenance(self.scorers)

    @property
    def compares_group(self) -> bool:
        """Whether one of the scorers compares the images of a prompt."""
        return any(members.compares_group(scorer) for scorer in self.scorers.values())

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt that one of the scorers cannot score, with the scorer's name."""
        for name, scorer in self.scorers.items():
            members.check(scorer, prompts, name)

    def self_check(self) -> None:
        """Raises ValueError where one of the scorers does not know its answers, with the scorer's name."""
        members.self_check(self.scorers)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to the parts of all scorers `[P, G, R]`.

        Raises:
            ValueError: a scorer failed or did not give finite parts for every image; it says which one.
        """
        found = {name: self._score(name, images, prompts) for name in self.scorers}
        names = tuple(f"{name}/{part}" for name, scores in found.items() for part in scores.names)
        parts = torch.cat([s.parts.to(images.device, torch.float32) for s in found.values()], dim=-1)
        return Scores(
            parts=parts,
            names=names,
            weights=tuple(self.weights[name] * weight for name, s in found.items() for weight in s.weights),
            reasons=tuple(
                tuple(
                    "; ".join(f"{name}: {scores.reasons[p][g]}" for name, scores in found.items())
                    for g in range(images.shape[1])
                )
                for p in range(images.shape[0])
            ),
            ranges=tuple(limits for s in found.values() for limits in s.ranges or (ANY,) * len(s.names)),
            gates=self._gates(found, parts, names),
            schedules=self._schedules(found),
        )

    def _gates(self, found: Mapping[str, Scores], parts: Tensor, names: Sequence[str]) -> Tensor | None:
        """Where each part counts, bool `[P, G, R]`: where its scorer's gate and those inside of it are open."""
        if not self.gates and all(scores.gates is None for scores in found.values()):
            return None
        columns = []
        for name, scores in found.items():
            inner = torch.ones_like(scores.parts, dtype=torch.bool) if scores.gates is None else scores.gates
            columns.append(inner.to(parts.device))
            if name in self.gates:
                gate = self.gates[name]
                if gate.part not in names:
                    raise ValueError(
                        f"the gate of {name!r} looks at a part of the combination, got {gate.part!r}, parts are "
                        f"{', '.join(names)}; choose of these"
                    )
                columns[-1] = columns[-1] & gate(parts[..., names.index(gate.part)])[..., None]
        return torch.cat(columns, dim=-1)

    def _schedules(
        self, found: Mapping[str, Scores]
    ) -> tuple[tuple[Callable[[int], float], ...], ...] | None:
        """For each part the factors of its weight: its scorer's and those inside of it."""
        if not self.schedules and all(scores.schedules is None for scores in found.values()):
            return None
        return tuple(
            (*((self.schedules[name],) if name in self.schedules else ()), *inner)
            for name, scores in found.items()
            for inner in scores.schedules or ((),) * len(scores.names)
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
