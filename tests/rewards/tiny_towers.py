"""Small CLIP models of open_clip with seeded random weights, saved as the real ones are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.types import Prompt

PROMPTS = (Prompt(1, "a photo of a red circle"), Prompt(2, "a blue square above a cat"), Prompt(3, "rain"))


def pictures(prompts: int = 3, group: int = 2, height: int = 48, width: int = 48) -> torch.Tensor:
    """Smooth random images uint8 `[P, G, H, W, 3]`."""
    coarse = torch.rand(prompts * group, 3, 6, 6, generator=torch.Generator().manual_seed(7))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (
        (fine * 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .reshape(prompts, group, height, width, 3)
        .contiguous()
    )


def tiny_clip(folder: Path, name: str = "tiny-clip", quick_gelu: bool = False, seed: int = 0) -> Any:
    """Registers a small architecture with open_clip and gives a model of it with random weights."""
    open_clip = pytest.importorskip(
        "open_clip", reason="open_clip is not installed: the extra `geneval` has it"
    )
    config = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.add_model_config(folder)
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained=None)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    return model.eval()


def open_clip_pixels(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """open_clip's own transform: one image `[H, W, 3]` through Pillow to `[3, 32, 32]`."""
    import open_clip
    from PIL import Image

    transform = open_clip.create_model_and_transforms(name, pretrained=None)[2]
    return lambda image: transform(Image.fromarray(image.numpy()))


def by_hand(
    model: Any,
    name: str,
    images: torch.Tensor,
    texts: list[str],
    pixels: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Cosines `[P, G]`, pair by pair, in float64 at the end."""
    import open_clip

    tokenizer = open_clip.get_tokenizer(name)
    found = torch.zeros(images.shape[:2], dtype=torch.float64)
    with torch.no_grad():
        for p in range(images.shape[0]):
            text = model.encode_text(tokenizer([texts[p]]))[0].double()
            for g in range(images.shape[1]):
                picture = model.encode_image(pixels(images[p, g])[None])[0].double()
                found[p, g] = picture @ text / (picture.norm() * text.norm())
    return found
