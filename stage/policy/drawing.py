"""From prompts to samples, with or without a plan before the image: what training, evaluation and samples share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from stage.policy.janus import JanusPolicy
from stage.policy.plans import check_planner, draw_plans, plan_prompt
from stage.policy.sampler import Sampler, uniforms
from stage.types import PromptTokens, Samples, map_tensors

# Domains of the uniforms behind plans and behind settings that vary; those of images have domain 0.
PLANS, SETTINGS = 1, 2


@dataclass(frozen=True)
class Noise:
    """Uniform numbers behind samples: `image` `[P, G, L]`, and with reasoning `plan` `[P, G, R]`.

    `guidance_scale` and `temperature` `[P, G]` are those of each sample where they vary.
    """

    image: Tensor
    plan: Tensor | None = None
    guidance_scale: Tensor | None = None
    temperature: Tensor | None = None


def reasons(sampler: Any) -> bool:
    """Whether a plan comes before each image. Any callable can stand for a sampler; one without the word does not."""
    return getattr(sampler, "reasoning", None) is not None


def check(policy: Any, sampler: Any) -> None:
    """Raise ValueError where the sampler wants plans that the policy cannot write."""
    if reasons(sampler):
        check_planner(policy)


def tokenize(policy: JanusPolicy, sampler: Sampler, texts: Sequence[str]) -> PromptTokens:
    """Prompts as this sampler begins: up to the image, or with reasoning up to the plan. Raises what `check` raises."""
    check(policy, sampler)
    return plan_prompt(policy, texts) if reasons(sampler) else policy.tokenize(texts)


def noise(
    policy: JanusPolicy,
    sampler: Sampler,
    seed: int,
    update: int,
    prompt_ids: Sequence[int],
    group: int,
    *,
    vary: bool = False,
) -> Noise:
    """The uniforms of `group` samples of each prompt; see `stage.policy.sampler.uniforms`.

    With `vary`, as in training, a sampler's `variation` draws guidance and temperature of each; validation, evaluation
    and pictures are drawn at the sampler's own.
    """
    image = uniforms(seed, update, prompt_ids, group, policy.num_image_tokens)
    plan = scale = temperature = None
    if reasons(sampler):
        assert sampler.max_plan_tokens is not None
        plan = uniforms(seed, update, prompt_ids, group, sampler.max_plan_tokens, domain=PLANS)
    variation = getattr(sampler, "variation", None) if vary else None
    if variation is not None:
        numbers = uniforms(seed, update, prompt_ids, group, 2, domain=SETTINGS)
        scale, temperature = variation(numbers, sampler.guidance_scale, sampler.temperature)
    return Noise(image, plan, scale, temperature)


def draw(policy: JanusPolicy, sampler: Sampler, prompt: PromptTokens, found: Noise) -> Samples:
    """A sample for each row of noise. Every plan is a prefix of its own, so images are then drawn in groups of one.

    Args:
        prompt: `[P, T]`, made by `tokenize` for the same sampler.
        found: noise of P prompts and G samples.

    Raises what the sampler and `draw_plans` raise.
    """
    given = (("guidance_scale", found.guidance_scale), ("temperature", found.temperature))
    varied: dict[str, Any] = {name: values for name, values in given if values is not None}
    if found.plan is None:
        return replace(sampler(policy, prompt, found.image, **varied), **varied)
    assert sampler.plan_temperature is not None
    plans = draw_plans(policy, prompt, found.plan, sampler.plan_temperature)
    rows = policy.with_plans(prompt, plans)
    alone = {name: values.view(-1, 1) for name, values in varied.items()}
    samples = sampler(policy, rows, found.image.flatten(0, 1).unsqueeze(1), **alone)
    shape = found.image.shape
    return replace(map_tensors(samples, lambda part: part.view(shape)), plans=plans, **varied)
