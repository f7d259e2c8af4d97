"""From prompts to everything one update learns from: sample, decode, score the reward, score the tokens.

Nothing here carries a gradient, except the one forward pass that may serve the rollout and the first update
alike (`collect`, argument `differentiable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stage.group_draws import Stopwatch, draw_groups
from stage.policy import drawing
from stage.ranks import ALONE, Ranks
from stage.types import (
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
    beside: bool,
    watch: Stopwatch,
    spare: Callable[[int], Sequence[Prompt]] | None = None,
    samples: slice | None = None,
    ranks: Ranks = ALONE,
    drawer: Any | None = None,
) -> Collected:
    """One rollout of `group_size` images for each prompt, with the seconds of its parts added to `watch`.

    `samples`: these alone of each group. An error of one process is raised by all of `ranks`. `drawer` samples and
    decodes in place of a sharded policy. The old scores are those of the training path, replayed on the sampled tokens in the same micro-batches as
    the update, so that the first ratio is exactly 1. With `differentiable` that replay keeps its graph and is
    returned as `scores`: where all samples fit into one forward and there is one update, it is that update's
    forward too. Then `rollout.old` is its detached copy. `beside`: see `judge`. With `resampling_rounds` groups of
    equal rewards give way to groups of `spare(round)`, see `replaced`.

    Raises what the scorer raises, and ValueError when it gives no `[P, G, R]` of finite parts in their ranges
    (`UnusableScores`, with the images).
    """
    distribution = scored_distribution(objective, sampler)
    here = group_size if samples is None else samples.stop - samples.start
    parts = micro_batches(len(prompts), here, objective.micro_batch)
    with torch.no_grad():
        look = None if reference is None else partial(look_back, reference, parts, distribution)
        how: dict[str, Any] = {"group_size": group_size, "seed": seed, "update": update, "watch": watch}
        how |= {"samples": samples, "ranks": ranks}
        prompt_tokens, kept, seen, count = draw_groups(
            drawer or policy, sampler, scorer, objective, prompts, spare, look, beside=beside, **how
        )
        drawn = kept.samples
    with watch("replay"), torch.set_grad_enabled(differentiable):
        live = look_back(policy, parts, distribution, prompt_tokens, drawn)
    rollout = Rollout(
        update=update,
        prompts=kept.prompts,
        prompt_tokens=prompt_tokens,
        tokens=drawn.tokens,
        codes=kept.codes,
        images=kept.images,
        scores=map_tensors(kept.scores.at(update), lambda tensor: tensor.to(drawn.tokens.device)),
        old=map_tensors(live, Tensor.detach),
        reference=seen,
        sampled_logps=drawn.logps,
        plans=drawn.plans,
        plan_weight=None if drawn.plans is None else sampler.reasoning_weight,
    )
    return Collected(rollout, live if differentiable else None, count)


def whole_groups(rollout: Rollout, ranks: Ranks) -> Rollout:
    """The rollout with all samples of its groups where these span several processes; images stay those drawn here."""

    def whole(part: Any) -> Any:
        return (
            ranks.whole_group(part)
            if isinstance(part, Tensor)
            else part and map_tensors(part, ranks.whole_group)
        )

    if ranks.sharing is None:
        return rollout
    parts = ("tokens", "codes", "sampled_logps", "scores", "old", "reference", "plans")
    found: dict[str, Any] = {name: whole(getattr(rollout, name)) for name in parts}
    return replace(rollout, **found)


def look_back(
    policy: Any, parts: Parts, distribution: Distribution, prompt_tokens: PromptTokens, samples: Samples
) -> TokenScores:
    """Teacher-forced scores of samples by this policy or the reference; see `score_tokens`."""
    return score_tokens(policy, prompt_tokens, samples.tokens, parts, distribution, samples.plans)
