"""The judge of the embedded world: a small convolutional network that finds shapes and names their colours.

It answers for every 4 x 4 pixel cell: is the centre of a circle, a square, ... here, which colour has it, how large
is it (the idea of centre points as objects is CenterNet's, arXiv 1904.07850). Pretraining shows it clean, blurred and
decoded pictures of all combinations, and half-erased or spliced shapes as "nothing", so that a mangled object does
not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from stage.paths import resolve
from stage.shapes.scenes import CLASSES, COLORS
from stage.types import Detection, Detections

STRIDE = 4
HEADS = (
    len(CLASSES),
    len(COLORS),
    4,
)  # centre, colour, and box as distances to left, top, right, bottom in pixels


class ShapeNet(nn.Module):
    """uint8 images `[N, H, W, 3]`, H and W multiples of 4, to the three maps of HEADS `[N, heads, H/4, W/4]`."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        plan = [(3, 24, 2, 1), (24, 32, 1, 1), (32, width, 2, 1)]
        plan += [(width, width, 1, dilation) for dilation in (1, 2, 1, 1)]
        layers: list[nn.Module] = []
        for channels, out, stride, dilation in plan:
            layers += [
                nn.Conv2d(channels, out, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Conv2d(width, sum(HEADS), 1)
        nn.init.constant_(self.head.bias[: len(CLASSES)], -3.0)  # type: ignore[index]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = images.permute(0, 3, 1, 2).to(self.head.weight.dtype) / 127.5 - 1
        heat, color, box = self.head(self.trunk(pixels)).split(HEADS, dim=1)
        return heat, color, F.softplus(box)


class ShapeDetector:
    """`Detector` and `ColorClassifier` of the embedded world.

    Args:
        weights: safetensors of a `ShapeNet`; a path, or `package://` inside the package.
        threshold: lowest score of a detection, in (0, 1).
        device: where the network runs.
    """

    class_names = CLASSES
    color_names = COLORS

    def __init__(self, weights: str, threshold: float, device: str = "cpu") -> None:
        if not 0 < threshold < 1:
            raise ValueError(
                f"threshold must lie between 0 and 1, got {threshold}; 0.4 is the measured default"
            )
        self.threshold = threshold
        self.device = torch.device(device)
        file = resolve(weights)
        self.net = _load(file).to(self.device)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        self.provenance = {"path": weights, "revision": None, "sha256": {file.name: digest}}
        # The colour maps of the pictures looked at last: a judge asks for objects first, then for their colours.
        self._seen: dict[bytes, Tensor] = {}

    def detect(self, images: np.ndarray) -> list[Detections]:
        """Objects by class in each of the images, uint8 `[N, H, W, 3]`, best first."""
        found: list[Detections] = []
        self._seen = {}
        for chunk in np.array_split(images, max(1, -(-len(images) // 128))):
            heat, color, box = self._maps(chunk)
            for i, image in enumerate(chunk):
                found.append(self._collect(heat[i], box[i]))
                self._seen[image.tobytes()] = color[i]
        return found

    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object, read at its centre from one image `[H, W, 3]`."""
        if not objects:
            return []
        color = self._seen.get(image.tobytes())
        if color is None:
            color = self._maps(image[None])[1][0]
        height, width = color.shape[-2:]
        names = []
        for item in objects:
            x = min(int((item.box[0] + item.box[2]) / 2 / STRIDE), width - 1)
            y = min(int((item.box[1] + item.box[3]) / 2 / STRIDE), height - 1)
            names.append(COLORS[int(color[:, y, x].argmax())])
        return names

    @torch.inference_mode()
    def _maps(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        heat, color, box = self.net(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
        return heat.sigmoid().cpu(), color.cpu(), box.cpu()

    def _collect(self, heat: Tensor, box: Tensor) -> Detections:
        """Peaks of the centre maps of one image; a peak is the best class of its 3 x 3 neighbourhood."""
        best, kind = heat.max(dim=0)
        peak = F.max_pool2d(best[None], 3, stride=1, padding=1)[0] == best
        rows, columns = (peak & (best >= self.threshold)).nonzero(as_tuple=True)
        found: dict[str, list[Detection]] = {}
        for y, x in sorted(
            zip(rows.tolist(), columns.tolist(), strict=True), key=lambda at: -float(best[at])
        ):
            left, top, right, bottom = box[:, y, x].tolist()
            cx, cy = (x + 0.5) * STRIDE, (y + 0.5) * STRIDE
            corners = (cx - left, cy - top, cx + right, cy + bottom)
            found.setdefault(CLASSES[int(kind[y, x])], []).append(Detection(corners, float(best[y, x])))
        return found


@lru_cache(maxsize=4)
def _load(path: Path) -> ShapeNet:
    net = ShapeNet()
    net.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return net.eval().requires_grad_(False)
