"""CLIP score: how near an image and its prompt lie in OpenAI's CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stage.rewards import grid, known_answers
from stage.rewards.tower import OPENAI_VIT_L_14, shared_tower
from stage.types import Prompt, Scores


class ClipReward:
    """Cosine between image and prompt, in [-1, 1]; generated images lie around 0.15 to 0.35.

    Source: THUDM/ImageReward ImageReward/models/CLIPScore.py. A weight of 2.5 gives the scale of CLIPScore (arXiv
    2104.08718), which also cuts negative values off, reads "A photo depicts" before the prompt and has ViT-B/32.

    Departures: 1. Weights are in `dtype` throughout and the cosine in float32.

    Args:
        path, revision: of the state dict in the layout of open_clip.
        architecture: open_clip's name of the tower; OpenAI's weights need QuickGELU.
        device, dtype, batch_size: see `stage.rewards.tower.Tower`. On random weights bfloat16 moves a score by less
            than 2e-2 and float16 by less than 2e-3.
    """

    def __init__(
        self, path: str, revision: str | None, architecture: str, device: str, dtype: str, batch_size: int
    ) -> None:
        self.tower = shared_tower(path, revision, OPENAI_VIT_L_14, architecture, device, dtype, batch_size)
        self.provenance = self.tower.provenance

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)

    def self_check(self) -> None:
        """Raises ValueError where the bundled pictures get other than what they must get."""
        known_answers.require_own_words(known_answers.totals(self), "clip")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or prompts cannot be scored.
        """
        found = self.tower.cosine(images, prompts).flatten()
        reasons = [f"CLIP cosine {value:.4f}" for value in found.tolist()]
        return grid.fold(found, images, prompts, reasons, (-1.0, 1.0), "clip")
