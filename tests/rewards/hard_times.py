"""What every scorer must survive or refuse: a card without memory, and pictures that are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stage.batches import Batches
from stage.rewards.pixels import Pixels
from stage.types import Prompt, Scorer


def survives_a_small_card(
    make: Callable[[], tuple[Any, Batches]],
    images: Tensor,
    prompts: Sequence[Prompt],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tolerance: float = 1e-5,
) -> None:
    """Where memory holds two pictures, the batch is halved and said to be, and the scores stay what they were.

    `make` gives a scorer and its batches, of 9 rows; `images` are 3 x 3.
    """
    scorer, batches = make()
    expected = scorer(images, prompts).parts
    assert batches.size == 9 and images.shape[:2] == (3, 3)
    whole, tried = Pixels.__call__, []

    def small(self: Pixels, pictures: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        tried.append(len(pictures))
        if len(pictures) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, pictures, device, dtype)

    monkeypatch.setattr(Pixels, "__call__", small)
    scores = scorer(images.clone(), prompts)  # a tower remembers the features of a tensor
    torch.testing.assert_close(scores.parts, expected, atol=tolerance, rtol=0)
    assert tried == [9, 4, 2, 2, 2, 2, 1] and batches.size == 2
    said = [record.message for record in caplog.records if record.name == "stage.batches"]
    assert [text.split(" at ")[1] for text in said] == [
        "9 rows and goes on with batch_size 4",
        "4 rows and goes on with batch_size 2",
    ]


def refuses_bad_images(scorer: Scorer, images: Tensor, prompts: Sequence[Prompt]) -> None:
    """Nothing of a wrong type or shape is scored; `images` are good."""
    for bad in (
        images[:, :, :0],
        images[..., :0, :],
        images[:, :0],
        images[..., :1],
        torch.cat([images, images[..., :1]], dim=-1),
        images[..., 0],
        images[0],
        images.float() / 255,
        images.int(),
        images.permute(0, 1, 4, 2, 3),
    ):
        with pytest.raises(
            ValueError, match=r"images are uint8 RGB \[P, G, H, W, 3\] with at least one pixel, got"
        ):
            scorer(bad, prompts)
    with pytest.raises(ValueError, match=r"one prompt for each group, got \d for \d groups"):
        scorer(images, (*prompts, prompts[0]))
