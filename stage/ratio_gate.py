"""Sampling and scoring must speak of one policy: a callback that compares them at every rollout and stops training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from stage.policy.decoder import compute_dtype
from stage.rollout import sampled_distribution, score_tokens, scored_distribution
from stage.types import Metrics, Rollout, map_tensors


class RatioGate(Callback):
    """Compares log-probabilities of sampled tokens with those of a teacher-forced replay of the same distribution.

    The first ratio of an update is exp of their difference. Both are of the distribution that the sampler draws from,
    guidance and temperature included. Where that is the one the objective scores, the rollout holds the replay;
    where it is not, some samples of the first prompt are replayed under the sampler's. What sampling from another
    distribution than the scored one costs is `policy/sampling_gap`, which nothing stops.

    Args:
        samples: replayed where the rollout holds no replay of the same distribution.
        bounds: largest mean |difference| in nats, by the type that the model computes in (`bfloat16`: ...).

    Raises ValueError for a sample count below 1 or a bound that is not positive.
    """

    def __init__(self, samples: int, bounds: Mapping[str, float]) -> None:
        if samples < 1:
            raise ValueError(f"ratio_gate.samples must be at least 1; got {samples}. Raise it.")
        if not all(bound > 0 for bound in bounds.values()):
            raise ValueError(f"ratio_gate.bounds must be positive; got {dict(bounds)}. Raise them.")
        self.samples, self.bounds = samples, dict(bounds)

    def on_rollout(self, module: Any, rollout: Rollout) -> Metrics:
        """Metrics of the comparison, nats; nothing for a greedy sampler, whose tokens have no ratio.

        Raises RuntimeError beyond the bound, ValueError where a type has none.
        """
        if module.sampler.temperature == 0:
            return {}
        name = str(compute_dtype(module.policy)).removeprefix("torch.")
        if name not in self.bounds:
            raise ValueError(
                f"ratio_gate.bounds must have a bound for the type the model computes in; {name} has none. Add it."
            )
        apart = self.differences(module, rollout).abs()
        mean = float(apart.mean())
        # Written so that NaN is beyond the bound.
        if not mean <= self.bounds[name]:
            raise RuntimeError(
                f"tokens must be scored as they were sampled: log-probabilities of decoding and replay of the same "
                f"distribution may differ by {self.bounds[name]} nats on average in {name}; they differ by {mean:.3g} "
                f"in update {rollout.update + 1}. Sampler and policy do not compute the same model: report it with "
                "this configuration, or raise callbacks.ratio_gate.bounds if rounding explains it."
            )
        return {"policy/ratio_gate_mean": mean, "policy/ratio_gate_max": float(apart.max())}

    def differences(self, module: Any, rollout: Rollout) -> Tensor:
        """Sampled minus replayed log-probabilities, `[P, G, L]` or of the samples that were replayed."""
        # Plans are given here, so at which temperature they would be scored does not matter.
        sampled = sampled_distribution(module.sampler, 1.0).of(rollout)
        scored = scored_distribution(module.objective, module.sampler).of(rollout)
        if _same(scored.guidance_scale, sampled.guidance_scale) and _same(
            scored.temperature, sampled.temperature
        ):
            return rollout.sampled_logps - rollout.old.logps
        first, some = slice(0, 1), slice(0, self.samples)
        prompt = map_tensors(rollout.prompt_tokens, lambda part: part[first])
        plans = rollout.plans and map_tensors(rollout.plans, lambda part: part[first, some])
        tokens = rollout.tokens[first, some]
        whole = [slice(0, 1)], [slice(0, tokens.shape[1])]
        with torch.no_grad():
            replayed = score_tokens(module.policy, prompt, tokens, whole, sampled.part(first, some), plans)
        return rollout.sampled_logps[first, some] - replayed.logps


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return one == other
