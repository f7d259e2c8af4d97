"""How far the images of one prompt lie apart: what training for a reward tends to cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage.rewards import grid
from stage.rewards.tower import OPENAI_VIT_L_14, shared_tower
from stage.types import Prompt, Scores


class DiversityReward:
    """Mean distance of an image to the others of its prompt, 1 minus the cosine of CLIP features, in [0, 2].

    The mean over the images of a prompt is the mean over its pairs.

    Args:
        path, revision: of the state dict in the layout of open_clip.
        architecture: open_clip's name of the tower; OpenAI's weights need QuickGELU.
        device, dtype, batch_size: see `stage.rewards.tower.Tower`.
    """

    compares_group = True

    def __init__(
        self, path: str, revision: str | None, architecture: str, device: str, dtype: str, batch_size: int
    ) -> None:
        self.tower = shared_tower(path, revision, OPENAI_VIT_L_14, architecture, device, dtype, batch_size)
        self.provenance = self.tower.provenance

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: there is one image a prompt only, or the images cannot be scored.
        """
        grid.check(images, prompts)
        group = images.shape[1]
        if group < 2:
            raise ValueError(
                f"a distance is between two images of a prompt, got {group} of each; set images_per_prompt=2 or more"
            )
        features = self.tower.images(images)
        distances = 1 - features @ features.transpose(1, 2)
        others = 1 - torch.eye(group, device=features.device)
        found = ((distances * others).sum(-1) / (group - 1)).flatten()
        reasons = [f"mean distance {value:.4f}" for value in found.tolist()]
        return grid.fold(found, images, prompts, reasons, (0.0, 2.0), "diversity")
