"""From images `[P, G]` with P prompts to a list of pictures, and from a list of values back to `Scores`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage.types import Prompt, Scores

# Rounding of bfloat16 and float16 may leave a closed range by this share of its width.
SLACK = 1e-2


def check(images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError unless images are uint8 `[P, G, H, W, 3]`, not empty, with P prompts that say something."""
    if images.dtype != torch.uint8 or images.dim() != 5 or images.shape[-1] != 3:
        raise ValueError(
            f"images are uint8 RGB [P, G, H, W, 3], got {images.dtype} {tuple(images.shape)}; convert them to "
            f"RGB and pass them as the policy decodes them"
        )
    if 0 in images.shape:
        raise ValueError(
            f"images have pixels, got {tuple(images.shape)} as [P, G, H, W, 3]; leave empty ones out"
        )
    if len(prompts) != images.shape[0]:
        raise ValueError(
            f"there is one prompt for each group, got {len(prompts)} for {images.shape[0]} groups; pass them in "
            f"the same order"
        )
    for prompt in prompts:
        if not prompt.text.strip():
            raise ValueError(
                f"a prompt says what to draw, number {prompt.id} is empty; remove it from the list"
            )


def fold(
    values: Tensor,
    images: Tensor,
    reasons: Sequence[str],
    limits: tuple[float, float],
    name: str,
) -> Scores:
    """Scores with the one part `score`, of weight 1.

    Args:
        values: `[P * G]`, one an image in the order of `images`.
        images: `[P, G, ...]`, for the grid and the device.
        reasons: one an image.
        limits: the closed range that the scorer states.
        name: of the scorer, for messages.

    Raises:
        ValueError: a value is not finite or outside its range.
    """
    low, high = limits
    slack = SLACK * (high - low) if high - low < float("inf") else 0.0
    found = values.detach().to(images.device, torch.float32).reshape(images.shape[:2])
    wrong = ~torch.isfinite(found) | (found < low - slack) | (found > high + slack)
    if wrong.any():
        p, g = (int(index) for index in wrong.nonzero()[0])
        raise ValueError(
            f"{name} gives finite values from {low:g} to {high:g}, got {found[p, g].item()} for image {g} of "
            f"prompt {p}; check its weights, and try dtype float32"
        )
    group = images.shape[1]
    return Scores(
        parts=found.clamp(low, high).unsqueeze(-1),
        names=("score",),
        weights=(1.0,),
        reasons=tuple(tuple(reasons[p * group : (p + 1) * group]) for p in range(images.shape[0])),
    )
