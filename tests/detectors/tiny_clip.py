"""A small random CLIP for open_clip: an architecture it is told of, and a file of weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

NAME = "tiny-clip-quickgelu"
ARCHITECTURE = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_clip(folder: Path) -> tuple[str, Path]:
    """The name under which open_clip knows the architecture now, and the file of its random weights."""
    import open_clip

    (folder / f"{NAME}.json").write_text(json.dumps(ARCHITECTURE), encoding="utf-8")
    open_clip.add_model_config(folder / f"{NAME}.json")
    model = open_clip.create_model(NAME)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    file = folder / "clip.pt"
    torch.save(model.state_dict(), file)
    return NAME, file
