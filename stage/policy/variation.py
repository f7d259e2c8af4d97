"""Training samples drawn at guidance scales and temperatures of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Variation:
    """Guidance and temperature that differ from sample to sample, or from group to group.

        temperature_i = temperature clip(1 + temperature_spread n_i, low, high)
        guidance_i    = max(1, guidance clip(1 + guidance_spread m_i, low, high))

    n and m are standard normal. Source: krennic999/STAGE, grpo_trainer.py, `dynamic_sample`, which draws 0.2 and 0.4
    wide within 0.5 and 2, for each sample, and scores conditional logits at temperature 1 all the same
    (`algorithm.distribution=conditional` here; `guided` scores each sample under its own). Departures:
    1. n and m are functions of (seed, update, prompt id, sample), and not of the state of a generator.
    2. Guidance is never below 1, where it would push away from the prompt.
    3. `per: group` gives the samples of a prompt one draw, so that their rewards differ by the tokens alone.

    temperature_spread, guidance_spread: standard deviation of the factor, 0 leaves that one as it is. low, high: bounds
    of the factor. per: sample or group.

    Raises ValueError for a negative spread or both 0, bounds that do not enclose 1, or another `per`.
    """

    temperature_spread: float
    guidance_spread: float
    low: float
    high: float
    per: str

    def __post_init__(self) -> None:
        spreads = self.temperature_spread, self.guidance_spread
        if not (all(0 <= spread < math.inf for spread in spreads) and any(spreads)):
            raise ValueError(
                f"sampler.variation needs spreads of at least 0, one of them above, got {spreads}; the release's are "
                "0.2 and 0.4"
            )
        if not 0 < self.low <= 1 <= self.high < math.inf:
            raise ValueError(
                f"factors of a variation lie around 1, 0 < low <= 1 <= high, got {self.low} and {self.high}; the "
                "release's are 0.5 and 2"
            )
        if self.per not in ("sample", "group"):
            raise ValueError(
                f"sampler.variation.per must be sample or group, got {self.per!r}; name one of them"
            )

    def __call__(
        self, uniforms: Tensor, guidance_scale: float, temperature: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Guidance scales and temperatures float32 `[P, G]` of uniforms `[P, G, 2]`; None for one that stays."""
        numbers = uniforms[:, :1].expand_as(uniforms) if self.per == "group" else uniforms
        normal = torch.special.ndtri(numbers.double())
        scale = heat = None
        if self.guidance_spread > 0:
            scale = (
                (guidance_scale * self._factor(normal[..., 0], self.guidance_spread)).clamp_min(1.0).float()
            )
        if self.temperature_spread > 0:
            heat = (temperature * self._factor(normal[..., 1], self.temperature_spread)).float()
        return scale, heat

    def _factor(self, normal: Tensor, spread: float) -> Tensor:
        return (1.0 + spread * normal).clamp(self.low, self.high)
