"""Human Preference Score v2.1: a CLIP ViT-H-14 fine-tuned on people's choices between generated images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stage.rewards import grid, known_answers
from stage.rewards.tower import shared_tower
from stage.types import Prompt, Scores
from stage.weights import Home

HOME = Home("xswu/HPSv2", "HPS_v2.1_compressed.pt")


class HPSReward:
    """Cosine between image and prompt, in [-1, 1]; generated images lie around 0.2 to 0.35.

    Source: arXiv 2306.09341; tgxs002/HPSv2 hpsv2/img_score.py, krennic999/STAGE src/grpo/src/utils/reward_hps.py.
    Like both it is the plain cosine, not multiplied by the temperature (100). The whole picture is seen, with black
    around it where it is no square, resized as floating point numbers (hpsv2/src/open_clip/transform.py).

    Departures:
        1. All images of a call go through the tower in batches, and each prompt once, instead of pair by pair.
        2. Weights are in `dtype` throughout and the cosine in float32; there it is autocast to float16, which
           leaves 11 bits to the cosine.

    Args:
        path, revision: of `HPS_v2.1_compressed.pt`.
        architecture: open_clip's name of the tower.
        device, dtype, batch_size: see `stage.rewards.tower.Tower`. On random weights bfloat16 moves a score by less
            than 2e-2 and float16 by less than 2e-3.
    """

    def __init__(
        self, path: str, revision: str | None, architecture: str, device: str, dtype: str, batch_size: int
    ) -> None:
        self.tower = shared_tower(path, revision, HOME, architecture, device, dtype, batch_size, whole=True)
        self.provenance = self.tower.provenance

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)

    def self_check(self) -> None:
        """Raises ValueError where the bundled pictures get other than what they must get."""
        known_answers.require_own_words(known_answers.totals(self), "hps")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: the images or prompts cannot be scored.
        """
        found = self.tower.cosine(images, prompts).flatten()
        reasons = [f"HPSv2.1 {value:.4f}" for value in found.tolist()]
        return grid.fold(found, images, prompts, reasons, (-1.0, 1.0), "hps")
