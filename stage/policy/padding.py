"""How prompts of different lengths share a batch: where the padding goes, who sees it, which positions it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stage.types import PromptTokens


@dataclass(frozen=True)
class LeftPadding:
    """Padding before the prompt, seen by no one and without a position: an image does not depend on its batch."""

    def arrange(self, prompt: PromptTokens, pad: int) -> PromptTokens:
        """Left-padded `prompt` as it is."""
        return prompt

    def positions(self, mask: Tensor) -> Tensor:
        """Positions `[R, S]` of a mask `[R, S]`: real tokens are counted from 0, whatever the padding."""
        return (mask.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class ReleasedPadding:
    """The published STAGE code, for comparison: padding between the prompt and the image start token.

    Source: krennic999/STAGE, src/grpo/src/open_r1/trainer/grpo_trainer.py, `compute_loss`, and the inference scripts
    beside it. What follows from it:
     1. Padding takes positions, so a prompt beside a longer one is further away from its image.
     2. Unconditional rows see their padding, bos and image start token included: their length is that of the longest
        prompt in the batch.
     3. A prompt that is the longest of its batch, or alone, gets what left padding gives it. The published training
        has one prompt a process, so there the two never differ.
    """

    def arrange(self, prompt: PromptTokens, pad: int) -> PromptTokens:
        """Left-padded `prompt` `[P, T]` with its padding moved in front of the last token, the image start token."""
        ids, mask = prompt.ids, prompt.mask
        words = mask[:, :-1].argsort(dim=1, descending=True, stable=True)
        order = torch.cat([words, torch.full_like(words[:, :1], ids.shape[1] - 1)], dim=1)
        free = torch.full_like(ids, pad)
        ids = ids.gather(1, order)
        free[:, 0], free[:, -1] = ids[:, 0], ids[:, -1]
        return replace(
            prompt,
            ids=ids,
            unconditional_ids=free,
            mask=mask.gather(1, order),
            unconditional_mask=torch.ones_like(mask),
        )

    def positions(self, mask: Tensor) -> Tensor:
        """Positions `[R, S]`: 0, 1, 2, ... with the padding counted."""
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
