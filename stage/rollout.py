"""From prompts to everything one update learns from: sample, decode, score the reward, score the tokens.

Nothing here carries a gradient, except the one forward pass that may serve the rollout and the first update
alike (`collect`, argument `differentiable`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stage.drawn import Drawn
from stage.policy import drawing
from stage.score_checks import check_values
from stage.types import (
    Metrics,
    Plans,
    Prompt,
    PromptTokens,
    Rollout,
    Samples,
    Scorer,
    TokenScores,
    map_tensors,
)

Parts = tuple[list[slice], list[slice]]


@dataclass(frozen=True)
class Distribution:
    """The distribution whose log-probabilities are the policy: guidance scale (1 = conditional) and
    temperature, and with reasoning the temperature of the plans.
    """

    guidance_scale: float
    temperature: float
    plan_temperature: float | None = None


@dataclass(frozen=True)
class Collected:
    """A rollout, and `scores` of the same tokens that still carry the graph when `collect` was asked for
    them. `groups_drawn` counts all groups that were drawn for it, those that were replaced too.
    """

    rollout: Rollout
    scores: TokenScores | None
    groups_drawn: int


class Stopwatch:
    """Adds up seconds by name. On CUDA it waits for the device, since kernels return before they have run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Metrics = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def scored_distribution(objective: Any, sampler: Any) -> Distribution:
    """What `objective.distribution` names: `conditional` is the model's own distribution, without guidance
    and at temperature 1, as the STAGE release scores (arXiv 2509.25027); `guided` is the one the sampler
    draws from.

    Raises ValueError for any other name.
    """
    planning = drawing.reasons(sampler)
    if objective.distribution == "conditional":
        return Distribution(1.0, 1.0, 1.0 if planning else None)
    if objective.distribution == "guided":
        words = sampler.plan_temperature if planning else None
        return Distribution(sampler.guidance_scale, sampler.temperature, words)
    raise ValueError(
        f"algorithm.distribution must be conditional or guided; got {objective.distribution!r}. Name one of them."
    )


def micro_batches(num_prompts: int, group_size: int, limit: int | None) -> Parts:
    """Slices of prompts and of samples whose product covers `[P, G]`, each of at most `limit` samples.

    Whole groups stay together while they fit; None is one slice of everything.
    Raises ValueError for a limit below 1.
    """
    if limit is None:
        return [slice(0, num_prompts)], [slice(0, group_size)]
    if limit < 1:
        raise ValueError(f"micro_batch must be at least 1 sample, or null for all; got {limit}. Raise it.")
    rows, columns = max(1, limit // group_size), min(limit, group_size)
    return _cut(num_prompts, rows), _cut(group_size, columns)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def take(prompt_tokens: PromptTokens, prompts: slice) -> PromptTokens:
    """The rows of some prompts."""
    return map_tensors(prompt_tokens, lambda tensor: tensor[prompts])


def score_part(
    score: Callable[..., TokenScores],
    prompt_tokens: PromptTokens,
    tokens: Tensor,
    plans: Plans | None,
    prompts: slice,
    samples: slice,
    distribution: Distribution,
) -> TokenScores:
    """Teacher-forced scores of some samples of some prompts by `score`, a policy's own or the policy as a module."""
    planned = {}
    if plans is not None:
        cut = map_tensors(plans, lambda tensor: tensor[prompts, samples])
        planned = {"plans": cut, "plan_temperature": distribution.plan_temperature}
    return score(
        take(prompt_tokens, prompts),
        tokens[prompts, samples],
        guidance_scale=distribution.guidance_scale,
        temperature=distribution.temperature,
        **planned,
    )


def draw(
    policy: Any, sampler: Any, prompts: Sequence[Prompt], group_size: int, *, seed: int, update: int
) -> tuple[PromptTokens, Samples]:
    """Sample `group_size` images of each prompt as tokens `[P, G, L]`, with plans where the sampler reasons.

    The uniforms behind a sample are a function of (seed, update, prompt id, sample index) alone, so it does
    not matter which other prompts are drawn in the same call.
    """
    prompt_tokens = drawing.tokenize(policy, sampler, [prompt.text for prompt in prompts])
    noise = drawing.noise(policy, sampler, seed, update, [prompt.id for prompt in prompts], group_size)
    return prompt_tokens, drawing.draw(policy, sampler, prompt_tokens, noise)


def score_tokens(
    policy: Any,
    prompt_tokens: PromptTokens,
    tokens: Tensor,
    parts: Parts,
    distribution: Distribution,
    plans: Plans | None = None,
) -> TokenScores:
    """Teacher-forced scores of `tokens` `[P, G, L]` and of their plans, computed micro-batch by micro-batch."""
    rows = []
    for prompts in parts[0]:
        scores = [
            score_part(policy.score, prompt_tokens, tokens, plans, prompts, samples, distribution)
            for samples in parts[1]
        ]
        rows.append(_join(scores, dim=1))
    return _join(rows, dim=0)


def _join(scores: list[TokenScores], dim: int) -> TokenScores:
    if len(scores) == 1:
        return scores[0]
    plans = [part.plan for part in scores if part.plan is not None]
    return TokenScores(
        logps=torch.cat([part.logps for part in scores], dim),
        entropy=torch.cat([part.entropy for part in scores], dim),
        plan=_join(plans, dim) if plans else None,
    )


def collect(
    policy: Any,
    reference: Any | None,
    sampler: Any,
    scorer: Scorer,
    objective: Any,
    prompts: Sequence[Prompt],
    *,
    update: int,
    seed: int,
    group_size: int,
    differentiable: bool,
    watch: Stopwatch,
    spare: Callable[[int], Sequence[Prompt]] | None = None,
) -> Collected:
    """One rollout of `group_size` images for each prompt, with the seconds of its parts added to `watch`.

    The old scores are those of the training path, replayed on the sampled tokens in the same micro-batches as
    the update, so that the first ratio is exactly 1. With `differentiable` that replay keeps its graph and is
    returned as `scores`: where all samples fit into one forward and there is one update, it is that update's
    forward too. Then `rollout.old` is its detached copy.

    With `resampling_rounds` groups of equal rewards give way to groups of `spare(round)`, see `replaced`.

    Raises what the scorer raises, and ValueError when it gives no `[P, G, R]` of finite parts in their ranges
    (`UnusableScores`, with the images).
    """
    distribution = scored_distribution(objective, sampler)
    parts = micro_batches(len(prompts), group_size, objective.micro_batch)
    with torch.no_grad():
        numbers: dict[str, Any] = {"group_size": group_size, "seed": seed, "update": update, "watch": watch}
        make: Callable[[Sequence[Prompt]], tuple[PromptTokens, Drawn]] = partial(
            draw_and_score, policy, sampler, scorer, features=objective.features, **numbers
        )
        prompt_tokens, first = make(prompts)
        kept, groups_drawn = replaced(first, make, spare, rounds=objective.resampling_rounds, update=update)
        if kept is not first:
            prompts = kept.prompts
            prompt_tokens = drawing.tokenize(policy, sampler, [prompt.text for prompt in prompts])
        samples, scores = kept.samples, kept.scores
        with watch("reference"):
            drawn = prompt_tokens, samples.tokens, parts, distribution, samples.plans
            reference_scores = None if reference is None else score_tokens(reference, *drawn)
    with watch("replay"), torch.set_grad_enabled(differentiable):
        live = score_tokens(policy, *drawn)
    rollout = Rollout(
        update=update,
        prompts=tuple(prompts),
        prompt_tokens=prompt_tokens,
        tokens=samples.tokens,
        codes=kept.codes,
        images=kept.images,
        scores=map_tensors(scores.at(update), lambda tensor: tensor.to(samples.tokens.device)),
        old=map_tensors(live, Tensor.detach),
        reference=reference_scores,
        sampled_logps=samples.logps,
        plans=samples.plans,
        plan_weight=None if samples.plans is None else sampler.reasoning_weight,
    )
    return Collected(rollout, live if differentiable else None, groups_drawn)


def draw_and_score(
    policy: Any,
    sampler: Any,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    features: str,
    group_size: int,
    seed: int,
    update: int,
    watch: Stopwatch,
) -> tuple[PromptTokens, Drawn]:
    """Samples of these prompts with images, rewards, and the vectors that the policy's method `features` gives."""
    with watch("sample"):
        prompt_tokens, samples = draw(policy, sampler, prompts, group_size, seed=seed, update=update)
        sampler.release()  # the update needs the memory; the next rollout takes it again in a fraction of a second
    with watch("decode"):
        images, codes = policy.decode(samples.tokens), getattr(policy, features)(samples.tokens)
    with watch("reward"):
        scores = scorer(images, prompts)
        check_shape(scores.parts, len(prompts), group_size)
        check_values(scores, images, prompts, "the scorer")
    return prompt_tokens, Drawn(tuple(prompts), samples, images, codes, scores)


def replaced(
    drawn: Drawn,
    make: Callable[[Sequence[Prompt]], tuple[PromptTokens, Drawn]],
    spare: Callable[[int], Sequence[Prompt]] | None,
    *,
    rounds: int,
    update: int,
) -> tuple[Drawn, int]:
    """As many groups, those of equal rewards replaced as far as `rounds` of spare prompts go, and how many were drawn.

    DAPO's dynamic sampling (arXiv 2503.14476). Departures:
    1. Rounds are limited; what is then missing is filled up with groups of equal rewards.
    2. A group is informative when its rewards differ; the paper asks for right and wrong answers in it.
    """
    count = len(drawn.prompts)
    for number in range(1, rounds + 1):
        if spare is None or bool(drawn.informative(update).all()):
            break
        known = {prompt.id for prompt in drawn.prompts}
        others = [prompt for prompt in spare(number) if prompt.id not in known]
        if others:
            count += len(others)
            drawn = drawn.refilled(make(others)[1], update)
    return drawn, count


def check_resampling(objective: Any, sampler: Any) -> None:
    """Raise ValueError where groups with plans would have to be replaced."""
    if objective.resampling_rounds and drawing.reasons(sampler):
        raise ValueError(
            f"groups of equal rewards are not replaced with reasoning, got algorithm.resampling_rounds="
            f"{objective.resampling_rounds}; set it to 0, or sampler.reasoning to null"
        )


def check_shape(parts: Tensor, num_prompts: int, group_size: int) -> None:
    """Raise ValueError unless reward parts are `[P, G, R]`."""
    if parts.ndim != 3 or tuple(parts.shape[:2]) != (num_prompts, group_size):
        raise ValueError(
            f"a reward must give parts [{num_prompts}, {group_size}, R], one row a prompt and one column a sample; "
            f"got {list(parts.shape)}. Correct the scorer."
        )
