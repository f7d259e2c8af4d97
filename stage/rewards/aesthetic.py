"""LAION's aesthetic predictor: how people rated pictures, from the image features of CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stage import weights
from stage.rewards import grid, known_answers
from stage.rewards.tower import OPENAI_VIT_L_14, shared_tower
from stage.types import Prompt, Scores

HOME = weights.Home("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
WIDTHS = (1024, 128, 64, 16, 1)


class Head(nn.Module):
    """`[N, D]` to `[N]`: five linear layers without anything between them but the dropout of training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # The names of the published file count dropout layers too.
        self.layers = nn.ModuleDict()
        for index, (before, after) in zip(
            (0, 2, 4, 6, 7), zip((width, *WIDTHS), WIDTHS, strict=False), strict=True
        ):
            self.layers[str(index)] = nn.Linear(before, after)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)

    def limits(self) -> tuple[float, float]:
        """What the head can give for features of unit length: its layers are one affine map."""
        with torch.no_grad():
            offset = self(torch.zeros(1, self.width, dtype=torch.float64))
            slope = self(torch.eye(self.width, dtype=torch.float64)) - offset
        length = slope.norm().item()
        return offset.item() - length, offset.item() + length


class AestheticReward:
    """A rating on a scale where people gave 1 to 10; generated images lie around 4.5 to 7.

    The prompt plays no part. The range that is checked is the one of the head's affine map over features of
    unit length, and known once the weights are read.

    Source: christophschuhmann/improved-aesthetic-predictor simple_inference.py.

    Departures:
        1. The tower is read in the layout of open_clip and shared with `reward=clip`.
        2. The tower's weights are in `dtype`, the head is float32.

    Args:
        path, revision: of `sac+logos+ava1-l14-linearMSE.pth`, which the hub has as `aesthetic-model.pth`.
        tower_path, tower_revision, architecture: see `stage.rewards.clip.ClipReward`.
        device, dtype, batch_size: see `stage.rewards.tower.Tower`.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        tower_path: str,
        tower_revision: str | None,
        architecture: str,
        device: str,
        dtype: str,
        batch_size: int,
    ) -> None:
        file = weights.locate(path, revision, HOME)
        state = weights.read_state(file)
        first = state.get("layers.0.weight")
        head = Head(first.shape[1] if first is not None and first.dim() == 2 else 768)
        weights.fill(head, state, file)
        self.limits = head.double().limits()
        self.tower = shared_tower(
            tower_path, tower_revision, OPENAI_VIT_L_14, architecture, device, dtype, batch_size
        )
        if self.tower.width != head.width:
            raise ValueError(
                f"the head reads the features of its tower, {file} wants {head.width} numbers "
                f"and {architecture} gives {self.tower.width}; give the tower that the head was trained on"
            )
        self.head = head.float().to(self.tower.device).requires_grad_(False)
        self.provenance = {
            **weights.provenance(file, path, revision),
            "tower": self.tower.provenance,
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        grid.check_texts(prompts)

    def self_check(self) -> None:
        """Raises ValueError where the bundled pictures get other than what they must get."""
        known_answers.require_difference(known_answers.totals(self), "aesthetic")

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: the images cannot be scored.
        """
        grid.check(images, prompts)
        found = self.head(self.tower.images(images)).flatten()
        reasons = [f"aesthetic {value:.3f}" for value in found.tolist()]
        return grid.fold(found, images, prompts, reasons, self.limits, "aesthetic")
