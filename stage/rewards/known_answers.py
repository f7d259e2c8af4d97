"""Bundled pictures with answers that any correct model gives, whatever its weights are called.

Two drawn pictures, a stop sign and a ball, and a plain grey one. Exact scores depend on weights and machine (see
`stage.rewards.selfcheck`); that a stop sign is more of a stop sign than a ball is does not. Every reward asks its own
form of that before the first rollout (`self_check`, `stage.types.ChecksItself`). Weights that were never trained, or
are all zero, and preprocessing that went wrong show here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from stage import paths
from stage.types import Prompt, Scorer

ASSETS = "package://stage/rewards/assets"
GREY = 127
SIDE = 384
# Each describes the picture of its own place.
PICTURES = ("stop_sign.png", "sports_ball.png")
PROMPTS = (
    Prompt(
        0,
        'a red stop sign that says "STOP"',
        {"tag": "colors", "include": [{"class": "stop sign", "count": 1, "color": "red"}]},
    ),
    Prompt(
        1,
        'an orange sports ball below the word "BALL"',
        {"tag": "colors", "include": [{"class": "sports ball", "count": 1, "color": "orange"}]},
    ),
)
# Of neither picture.
UNRELATED = (Prompt(2, "two horses in a forest in winter"), Prompt(3, "a bowl of soup beside a laptop"))
TOLERANCE = 1e-2  # of a score between batches, absolute and relative; bfloat16 has 8 bits

Values = Callable[[Tensor, Sequence[Prompt]], Tensor]


def picture(name: str) -> Tensor:
    """A bundled picture, uint8 `[H, W, 3]`."""
    from PIL import Image

    with Image.open(paths.resolve(ASSETS) / name) as opened:
        return torch.from_numpy(np.array(opened.convert("RGB")))


def grey(side: int = SIDE) -> Tensor:
    """A picture of nothing, uint8 `[side, side, 3]`."""
    return torch.full((side, side, 3), GREY, dtype=torch.uint8)


def pictures() -> Tensor:
    """The images uint8 `[2, 2, 384, 384, 3]` of the two prompts: their own picture and the other's."""
    one, two = (picture(name) for name in PICTURES)
    return torch.stack([torch.stack([one, two]), torch.stack([two, one])])


def totals(scorer: Scorer) -> Values:
    """The weighted sum of the parts of a scorer, `[P, G]`."""

    def values(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        scores = scorer(images, prompts)
        return scores.parts.cpu() @ torch.tensor(scores.weights)

    return values


def require_own_picture(values: Values, name: str) -> None:
    """Each of `PROMPTS` is worth more with its own picture than with the other one or a grey one.

    Args:
        values: images uint8 `[P, G, H, W, 3]` and P prompts to something `[P, G]` that grows with their match.
        name: of the scorer, for messages.

    Raises:
        ValueError: it is not so, or a value is not finite or depends on the pictures beside it.
    """
    found = _table(values, PROMPTS, name)
    for own, prompt in enumerate(PROMPTS):
        others = [value for column, value in enumerate(found[own].tolist()) if column != own]
        if not found[own, own] > max(others):
            raise ValueError(
                f"{name} must find {PICTURES[own]} nearest to {prompt.text!r}; it gave {found[own, own]:.4f} to it, "
                f"and {', '.join(f'{value:.4f}' for value in others)} to the other pictures"
            )


def require_own_words(values: Values, name: str) -> None:
    """Besides `require_own_picture`, each picture is worth more with its own prompt than with any other.

    Raises:
        ValueError: as `require_own_picture`.
    """
    require_own_picture(values, name)
    prompts = (*PROMPTS, *UNRELATED)
    found = _table(values, prompts, name)
    for own, file in enumerate(PICTURES):
        best = int(found[:, own].argmax())
        if best != own or (found[:, own] == found[own, own]).sum() > 1:
            raise ValueError(
                f"{name} must find {prompts[own].text!r} nearest to {file}; it gave "
                + ", ".join(
                    f"{value:.4f} to {prompt.text!r}"
                    for prompt, value in zip(prompts, found[:, own].tolist(), strict=True)
                )
            )


def require_difference(values: Values, name: str) -> None:
    """The three pictures are not all worth the same.

    Raises:
        ValueError: they are, or as `require_own_picture`.
    """
    found = _table(values, PROMPTS[:1], name)[0]
    if found.max() == found.min():
        raise ValueError(
            f"{name} must tell a stop sign, a ball and plain grey apart; it gave {found[0]:.4f} to each"
        )


def _table(values: Values, prompts: Sequence[Prompt], name: str) -> Tensor:
    """The values `[P, 3]` of the two pictures and the grey one, checked."""
    group = torch.stack([*(picture(file) for file in PICTURES), grey()])
    found = values(group.expand(len(prompts), *group.shape).contiguous(), prompts).double().cpu()
    if not found.isfinite().all():
        raise ValueError(f"the values of {name} must be finite; it gave {found.tolist()}")
    alone = values(group[None, 1:2].contiguous(), prompts[:1]).double().cpu()
    if not torch.allclose(alone, found[:1, 1:2], rtol=TOLERANCE, atol=TOLERANCE):
        raise ValueError(
            f"what {name} gives a picture must not depend on those beside it; it gave {PICTURES[1]} "
            f"{found[0, 1]:.4f} in a batch and {alone.item():.4f} alone. Try dtype float32"
        )
    return found
