"""How different the images of one prompt are, measured on the grids that training draws with the same noise."""

from __future__ import annotations

import numpy as np
from PIL import Image

from stage.report.read import Run

GAP = 2  # white pixels between the images of a grid


def grid_spread(run: Run, update: int) -> float | None:
    """Root mean square difference of pixels, in [0, 1], between two images of a prompt: mean over pairs and prompts.

    0 where every prompt has one picture. None where the run has no grid of that update, or one of unknown shape.
    """
    settings = (run.config.get("callbacks") or {}).get("images") or {}
    path = run.grids.get(update)
    if path is None or not path.is_file() or "samples" not in settings:
        return None
    with Image.open(path) as picture:
        images = cut_grid(np.asarray(picture.convert("RGB")), int(settings["samples"]))
    return None if images is None or images.shape[1] < 2 else spread(images)


def cut_grid(picture: np.ndarray, columns: int) -> np.ndarray | None:
    """uint8 `[H, W, 3]` as `[prompts, columns, h, w, 3]` of square images; None where it does not come out even."""
    height, width, _ = picture.shape
    side, rest = divmod(width + GAP, columns)
    side -= GAP
    rows, left = divmod(height + GAP, side + GAP) if side > 0 else (0, 1)
    if rest or left:
        return None
    padded = np.pad(picture, ((0, GAP), (0, GAP), (0, 0)))
    cells = padded.reshape(rows, side + GAP, columns, side + GAP, 3).swapaxes(1, 2)
    return cells[:, :, :side, :side]


def spread(images: np.ndarray) -> float:
    """The mean over prompts and pairs of samples of uint8 `[P, G, H, W, 3]`."""
    flat = images.reshape(*images.shape[:2], -1).astype(np.float64) / 255
    size = flat.shape[1]
    pairs = [(i, j) for i in range(size) for j in range(i)]
    gaps = [np.sqrt(np.mean((flat[:, i] - flat[:, j]) ** 2, axis=-1)) for i, j in pairs]
    return float(np.mean(gaps))
