"""Frozen records that travel between the rooms of `stage`, and the legend of their shapes.

Legend, used in every docstring of the project:

    P  prompts in a batch on one rank
    G  images sampled per prompt: the group, always an axis of its own
    L  image tokens per image, raster order
    T  prompt tokens, padded
    V  size of the image codebook
    C  dimension of a codebook vector
    R  named parts of a reward; of a plan, its longest length in tokens

Entropy and KL are in nats, images are uint8 HWC RGB, times are seconds, sizes bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

Metrics = dict[str, float]


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    `id` identifies the prompt wherever randomness is keyed by it; it does not depend on batch or rank.
    `metadata` is the line as it was read: in GenEval's schema (`tag`, `include`, `exclude`, `prompt`) or another.
    """

    id: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptTokens:
    """Padded prompt tokens that end where the first image token begins, or with reasoning where the plan begins.

    All are int64 `[P, T]`; `mask` is 1 on real tokens. It serves the unconditional rows too, unless
    `unconditional_mask` is there. Padding is on the left, unless the template asks for another.
    """

    ids: Tensor
    unconditional_ids: Tensor
    mask: Tensor
    unconditional_mask: Tensor | None = None


@dataclass(frozen=True)
class Plans:
    """What the model wrote before each image: `tokens` and `mask` int64, `logps` float32, all `[P, G, R]`.

    A plan's own tokens, the end token included where it was drawn, come first and have mask 1; padding follows, with
    log-probability 0. `logps` are under the distribution that was sampled.
    """

    tokens: Tensor
    mask: Tensor
    logps: Tensor


@dataclass(frozen=True)
class Samples:
    """What the sampler drew: `tokens` int64 `[P, G, L]` and `logps` `[P, G, L]`, and `plans` with reasoning.

    `logps` are log-probabilities under the distribution that was sampled (guidance and temperature included).
    `guidance_scale` and `temperature` float32 `[P, G]` are those of each sample where the sampler varies them, None
    where all have the sampler's own.
    """

    tokens: Tensor
    logps: Tensor
    plans: Plans | None = None
    guidance_scale: Tensor | None = None
    temperature: Tensor | None = None


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced `logps` `[P, G, L]` of given tokens and full-vocabulary `entropy` `[P, G, L]`, both in nats.

    With reasoning, `plan` has the same of the plan's tokens over the text vocabulary, `[P, G, R]`, 0 in the padding.
    `mask`, of the shape of `logps`, is 1 on a sample's own tokens; None where all of them are.
    `divergence` `[P, G, L]`, nats, is that of the whole distributions of policy and reference, and `features`
    `[P, G, L, D]` the input of the last layer that the reference gives for it; None where nothing asks for them.
    """

    logps: Tensor
    entropy: Tensor
    plan: TokenScores | None = None
    mask: Tensor | None = None
    divergence: Tensor | None = None
    features: Tensor | None = None


@dataclass(frozen=True)
class Scores:
    """What a reward found.

    `parts` float32 `[P, G, R]`; `names` and `weights` have length R. A part of weight 0 is logged and never optimised.
    `reasons[p][g]` says in words why an image got what it got. `ranges` are the lowest and highest value of each part,
    of length R, where the scorer states them; a value outside is an error, and None states nothing.

    `gates` bool `[P, G, R]`: a part counts as 0 where its gate is closed, and None is all open. `schedules` are, for
    each part, the factors of its weight as functions of the update (rollouts done); None is 1 throughout.
    """

    parts: Tensor
    names: tuple[str, ...]
    weights: tuple[float, ...]
    reasons: tuple[tuple[str, ...], ...]
    ranges: tuple[tuple[float, float], ...] | None = None
    gates: Tensor | None = None
    schedules: tuple[tuple[Callable[[int], float], ...], ...] | None = None

    def at(self, update: int) -> Scores:
        """The same scores with the weights of `update`."""
        if self.schedules is None:
            return self
        factors = [math.prod(factor(update) for factor in schedule) for schedule in self.schedules]
        weights = tuple(weight * factor for weight, factor in zip(self.weights, factors, strict=True))
        return replace(self, weights=weights, schedules=None)


@dataclass(frozen=True)
class Rollout:
    """Everything one update learns from, sampled and scored without gradient.

    Shapes: tokens `[P, G, L]`, codes `[P, G, L, C]`, images uint8 `[P, G, H, W, 3]`, scores.parts `[P, G, R]`.
    `reference` is None when neither the KL term nor the entropy reward needs one. With reasoning there are `plans`
    `[P, G, R]`, the prompt tokens end where they begin, and `plan_weight` is the weight of their term in the loss.
    `guidance_scale` and `temperature` are those of `Samples`.
    """

    update: int
    prompts: tuple[Prompt, ...]
    prompt_tokens: PromptTokens
    tokens: Tensor
    codes: Tensor
    images: Tensor
    scores: Scores
    old: TokenScores
    reference: TokenScores | None
    sampled_logps: Tensor
    plans: Plans | None = None
    plan_weight: float | None = None
    guidance_scale: Tensor | None = None
    temperature: Tensor | None = None


@dataclass(frozen=True)
class Detection:
    """One object found in an image: pixel box `(x0, y0, x1, y1)` and a score in [0, 1].

    `mask` is a bool array of the image's shape `[H, W]`, or None where the detector gives boxes alone.
    """

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


Detections = Mapping[str, Sequence[Detection]]


@runtime_checkable
class Detector(Protocol):
    """Finds objects: uint8 images `[N, H, W, 3]` to one mapping of class name to detections an image."""

    def detect(self, images: np.ndarray) -> list[Detections]: ...


@runtime_checkable
class ColorClassifier(Protocol):
    """Names the colour of each detected object of one class in one uint8 image `[H, W, 3]`."""

    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]: ...


@runtime_checkable
class BatchColorClassifier(Protocol):
    """A colour classifier that looks at many pictures at once.

    Each sight is a picture `[H, W, 3]`, the class of some objects in it and these objects; the answer has one list of
    colours for each sight.
    """

    def colors_in_batches(
        self, sights: Sequence[tuple[np.ndarray, str, Sequence[Detection]]]
    ) -> list[list[str]]: ...


@runtime_checkable
class NamesClasses(Protocol):
    """A detector that says which classes it can find; a scorer then refuses prompts that name another."""

    class_names: Sequence[str]


@runtime_checkable
class NamesColors(Protocol):
    """A colour classifier that says which colours it can name; a scorer then refuses prompts that name another."""

    color_names: Sequence[str]


@runtime_checkable
class Scorer(Protocol):
    """A reward: uint8 images `[P, G, H, W, 3]` and P prompts in, `Scores` out. Raises when it cannot score."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores: ...


@runtime_checkable
class ComparesGroup(Protocol):
    """A scorer that says whether its value of an image depends on the others of the prompt.

    One with `compares_group` is always given whole groups, also where a group's samples are on several processes.
    """

    @property
    def compares_group(self) -> bool: ...


@runtime_checkable
class ChecksPrompts(Protocol):
    """A scorer that can say which prompts it could never score; asked before the first image is drawn.

    `check` raises ValueError naming a prompt and the remedy.
    """

    def check(self, prompts: Sequence[Prompt]) -> None: ...


@runtime_checkable
class ChecksItself(Protocol):
    """A scorer that knows some answers; asked before the first image is drawn, see `stage.score_checks.check_itself`.

    `self_check` raises ValueError saying which picture got what, and what it should have got.
    """

    def self_check(self) -> None: ...


@runtime_checkable
class TextReader(Protocol):
    """Reads text: uint8 RGB images `[N, H, W, 3]` to the lines of each image, in reading order. Raises when it cannot.

    `provenance` is what results record of it: the name of the engine and the sha256 of each weight file.
    """

    @property
    def provenance(self) -> Mapping[str, Any]: ...

    def read(self, images: np.ndarray) -> list[tuple[str, ...]]: ...


def map_tensors(record: Any, function: Any) -> Any:
    """A copy of a frozen record with `function` applied to its tensors, and to those of a field of the same kind."""

    def mapped(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return function(value)
        return map_tensors(value, function) if isinstance(value, type(record)) else value

    return type(record)(**{name: mapped(value) for name, value in vars(record).items()})
