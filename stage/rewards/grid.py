"""From images `[P, G]` with P prompts to a list of pictures, and from a list of values back to `Scores`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stage.batches import Batches
from stage.score_checks import check_values
from stage.types import Prompt, Scores

# Rounding of bfloat16 and float16 may leave a closed range by this share of its width; that much is cut off.
SLACK = 1e-2


def check(images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError unless images are uint8 `[P, G, H, W, 3]`, not empty, with P prompts that say something."""
    check_images(images, prompts)
    check_texts(prompts)


def check_images(images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Raises ValueError unless images are uint8 `[P, G, H, W, 3]` with pixels, for P prompts."""
    if images.dtype != torch.uint8 or images.dim() != 5 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(
            f"images are uint8 RGB [P, G, H, W, 3] with at least one pixel, got {images.dtype} "
            f"{tuple(images.shape)}; convert them to RGB and pass them as the policy decodes them"
        )
    if len(prompts) != images.shape[0]:
        raise ValueError(
            f"there is one prompt for each group, got {len(prompts)} for {images.shape[0]} groups; pass them in "
            f"the same order"
        )


def check_texts(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError for the first prompt without text."""
    for prompt in prompts:
        if not prompt.text.strip():
            raise ValueError(
                f"a prompt says what to draw, number {prompt.id} is empty; remove it from the list"
            )


def pairs(
    batches: Batches,
    function: Callable[[Tensor, Sequence[str]], Tensor],
    images: Tensor,
    prompts: Sequence[Prompt],
) -> Tensor:
    """What `function` says of each image `[P, G, H, W, 3]` and the text of its prompt, `[P * G]`.

    It takes N pictures `[N, H, W, 3]` and N texts to `[N]`.
    """
    texts = [prompt.text for prompt in prompts for _ in range(images.shape[1])]
    return batches.run(function, images.flatten(0, 1), texts)


def fold(
    values: Tensor,
    images: Tensor,
    prompts: Sequence[Prompt],
    reasons: Sequence[str],
    limits: tuple[float, float],
    name: str,
) -> Scores:
    """Scores with the one part `score`, of weight 1.

    Args:
        values: `[P * G]`, one an image in the order of `images`.
        images, prompts: what was scored, `[P, G, H, W, 3]` and P.
        reasons: one an image.
        limits: the closed range that the scorer states.
        name: of the scorer, for messages.

    Raises:
        UnusableScores: a value is not finite or outside its range.
    """
    low, high = limits
    slack = SLACK * (high - low) if high - low < float("inf") else 0.0
    found = values.detach().to(images.device, torch.float32).reshape(images.shape[:2])
    rounding = (found >= low - slack) & (found <= high + slack)
    group = images.shape[1]
    scores = Scores(
        parts=torch.where(rounding, found.clamp(low, high), found).unsqueeze(-1),
        names=("score",),
        weights=(1.0,),
        reasons=tuple(tuple(reasons[p * group : (p + 1) * group]) for p in range(images.shape[0])),
        ranges=(limits,),
    )
    check_values(scores, images, prompts, name)
    return scores
