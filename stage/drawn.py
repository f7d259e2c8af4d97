"""Images and their rewards before anything else is computed of them, and which of their groups a rollout keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stage.objective.advantage import task_rewards, tied
from stage.types import Prompt, Samples, Scores, map_tensors


@dataclass(frozen=True)
class Drawn:
    """Samples of P prompts, `images` uint8 `[P, G, H, W, 3]`, `codes` `[P, G, L, C]`, and their rewards."""

    prompts: tuple[Prompt, ...]
    samples: Samples
    images: Tensor
    codes: Tensor
    scores: Scores

    def informative(self, update: int) -> Tensor:
        """bool `[P]`: groups whose task rewards, with the weights of `update`, are not all equal."""
        return ~tied(task_rewards(self.scores.at(update)))

    def take(self, chosen: Sequence[int]) -> Drawn:
        """The groups of these places, in this order."""
        index = torch.tensor(list(chosen), dtype=torch.long)

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index.to(tensor.device)]

        reasons = tuple(self.scores.reasons[place] for place in chosen)
        return Drawn(
            prompts=tuple(self.prompts[place] for place in chosen),
            samples=map_tensors(self.samples, cut),
            images=cut(self.images),
            codes=cut(self.codes),
            scores=replace(map_tensors(self.scores, cut), reasons=reasons),
        )

    def followed_by(self, other: Drawn) -> Drawn:
        """All groups of both, of one sampler without plans and one scorer."""
        first, second = self.scores, other.scores
        gates = None
        if first.gates is not None and second.gates is not None:
            gates = torch.cat([first.gates, second.gates])
        return Drawn(
            prompts=self.prompts + other.prompts,
            samples=Samples(
                tokens=torch.cat([self.samples.tokens, other.samples.tokens]),
                logps=torch.cat([self.samples.logps, other.samples.logps]),
                guidance_scale=_joined(self.samples.guidance_scale, other.samples.guidance_scale),
                temperature=_joined(self.samples.temperature, other.samples.temperature),
            ),
            images=torch.cat([self.images, other.images]),
            codes=torch.cat([self.codes, other.codes]),
            scores=replace(
                first,
                parts=torch.cat([first.parts, second.parts]),
                reasons=first.reasons + second.reasons,
                gates=gates,
            ),
        )


def _joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])
