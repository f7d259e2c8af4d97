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

PLANS = 1  # domain of the uniforms behind plans; those of images have domain 0


@dataclass(frozen=True)
class Noise:
    """Uniform numbers behind samples: `image` `[P, G, L]`, and with reasoning `plan` `[P, G, R]`."""

    image: Tensor
    plan: Tensor | None = None


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
    policy: JanusPolicy, sampler: Sampler, seed: int, update: int, prompt_ids: Sequence[int], group: int
) -> Noise:
    """The uniforms of `group` samples of each prompt; see `stage.policy.sampler.uniforms`."""
    image = uniforms(seed, update, prompt_ids, group, policy.num_image_tokens)
    if not reasons(sampler):
        return Noise(image)
    assert sampler.max_plan_tokens is not None
    return Noise(image, uniforms(seed, update, prompt_ids, group, sampler.max_plan_tokens, domain=PLANS))


def draw(policy: JanusPolicy, sampler: Sampler, prompt: PromptTokens, found: Noise) -> Samples:
    """A sample for each row of noise. Every plan is a prefix of its own, so images are then drawn in groups of one.

    Args:
        prompt: `[P, T]`, made by `tokenize` for the same sampler.
        found: noise of P prompts and G samples.

    Raises what the sampler and `draw_plans` raise.
    """
    if found.plan is None:
        return sampler(policy, prompt, found.image)
    assert sampler.plan_temperature is not None
    plans = draw_plans(policy, prompt, found.plan, sampler.plan_temperature)
    rows = policy.with_plans(prompt, plans)
    samples = sampler(policy, rows, found.image.flatten(0, 1).unsqueeze(1))
    shape = found.image.shape
    return replace(map_tensors(samples, lambda part: part.view(shape)), plans=plans)
