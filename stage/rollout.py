"""From prompts to everything one update learns from: sample, decode, score the reward, score the tokens.

Nothing here carries a gradient, except the one forward pass that may serve the rollout and the first update
alike (`collect`, argument `differentiable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stage.drawn import Drawn
from stage.group_draws import Drawer, Stopwatch, draw_groups
from stage.objective.distributions import Comparison
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
    temperature, and with reasoning the temperature of the plans. With `varied` the first two are those of each
    sample, as soon as samples are given (`of`).
    """

    guidance_scale: float | Tensor
    temperature: float | Tensor
    plan_temperature: float | None = None
    varied: bool = False

    def of(self, samples: Samples | Rollout) -> Distribution:
        """That of these samples, with `[P, G]` in place of what varies."""
        if not self.varied:
            return self
        scale, temperature = samples.guidance_scale, samples.temperature
        return replace(
            self,
            guidance_scale=self.guidance_scale if scale is None else scale,
            temperature=self.temperature if temperature is None else temperature,
        )

    def part(self, prompts: slice, samples: slice) -> Distribution:
        """That of some prompts and some samples."""

        def cut(value: float | Tensor) -> float | Tensor:
            return value[prompts, samples] if isinstance(value, Tensor) else value

        return replace(self, guidance_scale=cut(self.guidance_scale), temperature=cut(self.temperature))


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
    draws from, each sample's own where the sampler varies it.

    Raises ValueError for any other name.
    """
    planning = drawing.reasons(sampler)
    if objective.distribution == "conditional":
        return Distribution(1.0, 1.0, 1.0 if planning else None)
    if objective.distribution == "guided":
        words = sampler.plan_temperature if planning else None
        return sampled_distribution(sampler, words)
    raise ValueError(
        f"algorithm.distribution must be conditional or guided; got {objective.distribution!r}. Name one of them."
    )


def sampled_distribution(sampler: Any, plan_temperature: float | None) -> Distribution:
    """The distribution that the sampler draws images from."""
    varied = getattr(sampler, "variation", None) is not None
    return Distribution(sampler.guidance_scale, sampler.temperature, plan_temperature, varied)


def check_comparison(objective: Any, sampler: Any) -> None:
    """Raise ValueError where whole distributions of plans would have to be compared."""
    if getattr(objective, "compared", None) is not None and drawing.reasons(sampler):
        raise ValueError(
            f"whole distributions are compared for image tokens alone, got {type(objective.compared).__name__} with "
            "sampler.reasoning; take algorithm/divergence=k1, k2 or k3, or set sampler.reasoning to null"
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
    compare: Comparison | None = None,
    **options: Any,
) -> TokenScores:
    """Teacher-forced scores of some samples of some prompts by `score`, a policy's own or the policy as a module.

    `compare` adds the divergence of whole distributions; `options` go on to `score`.
    """
    if plans is not None:
        cut = map_tensors(plans, lambda tensor: tensor[prompts, samples])
        options |= {"plans": cut, "plan_temperature": distribution.plan_temperature}
    if compare is not None:
        options["compare"] = compare.part(prompts, samples)
    own = distribution.part(prompts, samples)
    return score(
        take(prompt_tokens, prompts),
        tokens[prompts, samples],
        guidance_scale=own.guidance_scale,
        temperature=own.temperature,
        **options,
    )


def score_tokens(
    policy: Any,
    prompt_tokens: PromptTokens,
    tokens: Tensor,
    parts: Parts,
    distribution: Distribution,
    plans: Plans | None = None,
    **options: Any,
) -> TokenScores:
    """Teacher-forced scores of `tokens` `[P, G, L]` and of their plans, computed micro-batch by micro-batch.

    `options` are those of `score_part`.
    """
    rows = []
    for prompts in parts[0]:
        scores = [
            score_part(policy.score, prompt_tokens, tokens, plans, prompts, samples, distribution, **options)
            for samples in parts[1]
        ]
        rows.append(_join(scores, dim=1))
    return _join(rows, dim=0)


def _join(scores: list[TokenScores], dim: int) -> TokenScores:
    if len(scores) == 1:
        return scores[0]
    plans = [part.plan for part in scores if part.plan is not None]

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in scores]
        return None if found[0] is None else torch.cat(found, dim)

    return TokenScores(
        logps=torch.cat([part.logps for part in scores], dim),
        entropy=torch.cat([part.entropy for part in scores], dim),
        plan=_join(plans, dim) if plans else None,
        divergence=joined("divergence"),
        features=joined("features"),
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
    drawer: Drawer | None = None,
) -> Collected:
    """One rollout of `group_size` images for each prompt, with the seconds of its parts added to `watch`.

    `samples`: these alone of each group. An error of one process is raised by all of `ranks`. `drawer` lends what
    samples and decodes in place of a sharded policy. The old scores are those of the training path, replayed on the
    sampled tokens in the same micro-batches as the update, so that the first ratio is exactly 1. With `differentiable`
    that replay keeps its graph and is returned as `scores`: where all samples fit into one forward and there is one
    update, it is that update's forward too. Then `rollout.old` is its detached copy. `beside`: see `judge`. With
    `resampling_rounds` groups of equal rewards give way to groups of `spare(round)`, see `replaced`.

    Raises what the scorer raises, and ValueError when it gives no `[P, G, R]` of finite parts in their ranges
    (`UnusableScores`, with the images).
    """
    distribution = scored_distribution(objective, sampler)
    here = group_size if samples is None else samples.stop - samples.start
    parts = micro_batches(len(prompts), here, objective.micro_batch)
    with torch.no_grad():
        look = None if reference is None else partial(look_back, reference, parts, distribution)
        if look is not None and getattr(objective, "compared", None) is not None:
            look = partial(look, keep_features=True)
        how: dict[str, Any] = {"group_size": group_size, "seed": seed, "update": update, "watch": watch}
        how |= {"samples": samples, "ranks": ranks}
        drawer = partial(nullcontext, policy) if drawer is None else drawer
        prompt_tokens, kept, seen, count = draw_groups(
            drawer, sampler, scorer, objective, prompts, spare, look, beside=beside, **how
        )
        drawn = kept.samples
    with watch("replay"), torch.set_grad_enabled(differentiable):
        # Without a graph nothing is learned from this pass, and the divergence would be computed in vain.
        other = comparison(objective, reference, seen) if differentiable else None
        live = look_back(policy, parts, distribution, prompt_tokens, drawn, compare=other)
    weight = None if drawn.plans is None else sampler.reasoning_weight
    rollout = _record(update, prompt_tokens, kept, live, seen, weight)
    return Collected(rollout, live if differentiable else None, count)


def _record(
    update: int,
    prompt_tokens: PromptTokens,
    kept: Drawn,
    live: TokenScores,
    seen: TokenScores | None,
    plan_weight: float | None,
) -> Rollout:
    """Groups and what policy and reference find in them, without any graph."""
    drawn = kept.samples
    return Rollout(
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
        plan_weight=plan_weight,
        guidance_scale=drawn.guidance_scale,
        temperature=drawn.temperature,
    )


def look_back(
    policy: Any,
    parts: Parts,
    distribution: Distribution,
    prompt_tokens: PromptTokens,
    samples: Samples,
    **options: Any,
) -> TokenScores:
    """Teacher-forced scores of samples by this policy or the reference; see `score_tokens`."""
    own = distribution.of(samples)
    return score_tokens(policy, prompt_tokens, samples.tokens, parts, own, samples.plans, **options)


def comparison(objective: Any, reference: Any, seen: TokenScores | None) -> Comparison | None:
    """What the policy's distributions are compared with, from what the reference saw; None where nothing asks.

    Raises ValueError for a reference whose last layer lies in pieces.
    """
    kind = getattr(objective, "compared", None)
    if kind is None or seen is None or seen.features is None:
        return None
    weight, bias = reference.last_layer()
    if hasattr(weight, "placements"):  # one of torch's DTensors
        raise ValueError(
            f"{type(kind).__name__} needs the reference's last layer in one piece, got one that is sharded; with "
            "strategy=fsdp take algorithm/divergence=k1, k2 or k3"
        )
    return Comparison(kind, seen.features, weight, bias)
