"""Pictures as a model wants to see them: resized, cropped and normalised, all of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
# What `resample` of a preprocessor_config.json means: the constants of Pillow.
RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Pixels:
    """Preprocessing of a model, after the published one on Pillow images.

    Departures:
        1. All pictures are resized at once on the device of the model, as uint8 with antialiasing; a pixel
           differs from Pillow's by one level of 255 at most. Sizes round as in torchvision.
        2. Where `longest` decides, the longer side gets exactly that; some published code rounds twice and may
           lose a pixel.

    Args:
        side: length of the shorter side after resizing, in pixels.
        longest: limit of the longer side, which then decides instead; None for none.
        crop: side of the square cut from the middle, filled up with black; None for the whole picture.
        mode: `bilinear` or `bicubic`.
        mean, std: of the colours, in [0, 1].
        rounded: resized pixels are whole levels, as Pillow makes them. False: fractions, resized as tensors are.
    """

    side: int
    longest: int | None
    crop: int | None
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rounded: bool = True

    def __call__(self, pictures: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Pictures uint8 `[N, H, W, 3]` to `[N, 3, h, w]` of the given dtype on the given device."""
        found = pictures.to(device).permute(0, 3, 1, 2)
        size = self.size(found.shape[-2], found.shape[-1])
        if size != found.shape[-2:]:
            found = found if self.rounded else found.float()
            found = functional.resize(found, list(size), interpolation=MODES[self.mode], antialias=True)
        if self.crop is not None:
            found = functional.center_crop(found, [self.crop, self.crop])
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std))
        return ((found.float() / 255 - mean) / std).to(dtype)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        short, long = min(height, width), max(height, width)
        if self.longest is not None and self.side * long / short > self.longest:
            side, other = round(self.longest * short / long), self.longest
        else:
            side, other = self.side, int(self.side * long / short)
        return (side, other) if height <= width else (other, side)


def from_processor(config: Mapping[str, Any]) -> Pixels:
    """What a `preprocessor_config.json` of transformers asks for.

    Raises:
        ValueError: it asks for something that `Pixels` does not do.
    """
    omitted = [step for step in ("do_resize", "do_rescale", "do_normalize") if not config.get(step, True)]
    if omitted:
        raise ValueError(
            f"preprocessing resizes, divides by 255 and normalises, got {', '.join(omitted)} false; give the "
            f"original file"
        )
    size = config.get("size")
    if isinstance(size, int):
        side, longest = size, None
    elif isinstance(size, Mapping) and "shortest_edge" in size:
        side, longest = int(size["shortest_edge"]), size.get("longest_edge")
    elif isinstance(size, Mapping) and size.get("height") == size.get("width") is not None:
        side, longest = int(size["height"]), None
    else:
        raise ValueError(
            f"preprocessing names a side or a shortest_edge, got size {size!r}; give the original file"
        )
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    if isinstance(crop, Mapping):
        crop = crop["height"]
    if (
        config.get("resample") not in RESAMPLE
        or not abs(config.get("rescale_factor", 1 / 255) * 255 - 1) < 1e-6
    ):
        raise ValueError(
            f"preprocessing resizes bilinearly (2) or bicubically (3) and divides by 255, got resample "
            f"{config.get('resample')!r} and rescale_factor {config.get('rescale_factor')!r}; give the original file"
        )
    return Pixels(
        side=side,
        longest=None if longest is None else int(longest),
        crop=None if crop is None else int(crop),
        mode=RESAMPLE[config["resample"]],
        mean=tuple(float(value) for value in config["image_mean"]),
        std=tuple(float(value) for value in config["image_std"]),
    )
