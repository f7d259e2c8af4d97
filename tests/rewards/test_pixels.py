"""Preprocessing of whole batches beside the published code on single Pillow images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stage.rewards.pixels import CLIP_MEAN, CLIP_STD, Pixels, from_processor
from tests.rewards.tiny_towers import pictures

CPU = torch.device("cpu")
CLIP: dict[str, Any] = {
    "do_center_crop": True,
    "crop_size": {"height": 24, "width": 24},
    "size": {"shortest_edge": 24},
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
}
DINO = {
    "size": {"shortest_edge": 40, "longest_edge": 64},
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def pillow(image: torch.Tensor, size: tuple[int, int], mode: int) -> torch.Tensor:
    """One image `[H, W, 3]` resized by Pillow to (height, width), in [0, 1], `[3, h, w]`."""
    found = Image.fromarray(image.numpy()).resize((size[1], size[0]), Image.Resampling(mode))
    return torch.from_numpy(np.array(found)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("shape", "size"),
    [((36, 36), (24, 24)), ((30, 50), (24, 40)), ((50, 30), (40, 24)), ((10, 17), (24, 40))],
)
def test_clip_preprocessing_is_pillows(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Shorter side to 24 (24 * 50 / 30 = 40; 24 * 17 / 10 = 40.8, cut), then the middle 24 of 40."""
    images = pictures(1, 3, *shape)[0]
    pixels = from_processor(CLIP)
    assert pixels.size(*shape) == size
    found = pixels(images, CPU, torch.float32)
    assert found.shape == (3, 3, 24, 24)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    for image, ours in zip(images, found, strict=True):
        top, left = (size[0] - 24) // 2, (size[1] - 24) // 2
        expected = pillow(image, size, 3)[:, top : top + 24, left : left + 24]
        assert (ours * std + mean - expected).abs().max() <= 1.01 / 255


@pytest.mark.parametrize(
    ("shape", "size"),
    [((30, 30), (40, 40)), ((30, 45), (40, 60)), ((30, 60), (32, 64)), ((61, 20), (64, 21))],
)
def test_detector_preprocessing_is_pillows(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Shorter side to 40 unless the longer were above 64: then 64, and 64 * 20 / 61 = 20.98 for the other."""
    pixels = from_processor(DINO)
    assert pixels.size(*shape) == size
    images = pictures(1, 2, *shape)[0]
    found = pixels(images, CPU, torch.float32)
    mean, std = (torch.tensor(DINO[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    for image, ours in zip(images, found, strict=True):
        assert (ours * std + mean - pillow(image, size, 2)).abs().max() <= 1.01 / 255


def test_transformers_reads_the_same_settings_alike() -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(**CLIP)
    images = pictures(1, 2, 30, 50)[0]
    theirs = processor(
        images=[Image.fromarray(image.numpy()) for image in images], return_tensors="pt"
    ).pixel_values
    ours = from_processor(CLIP)(images, CPU, torch.float32)
    assert (theirs - ours).abs().max() <= 1.01 / 255 / min(CLIP_STD)


def test_the_longer_side_fits_and_black_fills_the_rest() -> None:
    pixels = Pixels(32, 32, 32, "bicubic", (0.0,) * 3, (1.0,) * 3, rounded=False)
    found = pixels(torch.full((1, 20, 64, 3), 255, dtype=torch.uint8), CPU, torch.float32)[0, 0]
    assert found.shape == (32, 32)  # 20 / 64 * 32 = 10 rows, 11 black ones above and below
    assert found[:11].eq(0).all() and found[21:].eq(0).all()
    torch.testing.assert_close(found[11:21], torch.ones(10, 32))


def test_dtype_is_asked_for() -> None:
    assert from_processor(CLIP)(pictures(1, 1)[0], CPU, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"width": 3, "height": 4}}, "names a side"),
        ({"resample": 1}, "resample 1"),
        ({"rescale_factor": 1.0}, "rescale_factor 1.0"),
    ],
)
def test_settings_that_are_not_known(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_processor({**CLIP, **changes})


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_step_that_is_left_out_is_refused(step: str) -> None:
    assert from_processor({**CLIP, step: True}) == from_processor(CLIP)
    with pytest.raises(ValueError, match=f"resizes, divides by 255 and normalises, got {step} false"):
        from_processor({**CLIP, step: False})
