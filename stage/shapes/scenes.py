"""Flat shapes on plain backgrounds: a scene as tensors, and its picture.

A batch of N scenes is a handful of tensors, so that hundreds of thousands can be drawn on a GPU in seconds (a Python
loop over scenes was the bottleneck of pretraining). Objects sit near the centres of the patches that become image
tokens: one object is about one token, which is what gives a policy gradient something to hold on to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLURALS = ("circles", "squares", "triangles", "crosses", "rings", "diamonds")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RGB = (
    (218, 38, 42),
    (246, 132, 24),
    (248, 218, 48),
    (44, 158, 66),
    (44, 92, 212),
    (132, 52, 172),
    (248, 140, 192),
    (122, 72, 36),
    (22, 22, 24),
    (246, 246, 246),
)
# Muted, so that no background can be mistaken for one of the ten colours.
BACKGROUNDS = (
    (196, 196, 196),
    (150, 150, 150),
    (98, 98, 102),
    (205, 190, 160),
    (150, 186, 188),
    (150, 166, 196),
    (166, 186, 160),
    (118, 128, 112),
)
MAX_OBJECTS = 4


@dataclass(frozen=True)
class World:
    """Geometry in pixels: `size` is a multiple of `patch`; radius and offset from a patch centre vary.

    As it stands no object leaves its patch: the widest, a diamond, reaches 1.1 * 6.8 + 0.5 < 8 pixels from the centre.
    """

    size: int = 96
    patch: int = 16
    radius: tuple[float, float] = (6.0, 6.8)
    jitter: float = 0.5

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.size // self.patch


@dataclass(frozen=True)
class Scenes:
    """N scenes of up to K = MAX_OBJECTS objects.

    kind, color int64 `[N, K]` (indices into CLASSES and COLORS), present bool `[N, K]`, center float32 `[N, K, 2]`
    (x, y in pixels), radius float32 `[N, K]`, tone int64 `[N]` (index into BACKGROUNDS).
    """

    kind: Tensor
    color: Tensor
    present: Tensor
    center: Tensor
    radius: Tensor
    tone: Tensor

    def __len__(self) -> int:
        return self.kind.shape[0]

    @property
    def background(self) -> Tensor:
        """Colour of each background, float32 `[N, 3]`, 0 to 255."""
        return torch.tensor(BACKGROUNDS, dtype=torch.float32, device=self.tone.device)[self.tone]

    def boxes(self) -> Tensor:
        """Bounding boxes `[N, K, 4]` as (x0, y0, x1, y1) in pixels."""
        half = torch.tensor([_EXTENT[name] for name in CLASSES], device=self.kind.device)[self.kind]
        left_top = self.center + half[..., :2] * self.radius[..., None]
        right_bottom = self.center + half[..., 2:] * self.radius[..., None]
        return torch.cat([left_top, right_bottom], dim=-1)


# Bounding box of each class around its centre, in radii: (x0, y0, x1, y1).
_EXTENT = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.86, -0.86, 0.86, 0.86),
    "triangle": (-1.05, -1.0, 1.05, 0.86),
    "cross": (-1.0, -1.0, 1.0, 1.0),
    "ring": (-1.0, -1.0, 1.0, 1.0),
    "diamond": (-1.1, -1.1, 1.1, 1.1),
}


def _distances(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Signed distance in pixels to each class, negative inside: `[len(CLASSES), ...]` for offsets x, y of one shape."""
    length = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = x.abs(), y.abs()
    circle = length - radius
    square = torch.maximum(ax, ay) - 0.86 * radius
    # Apex at (0, -r), base at y = 0.86 r with half width 1.05 r: the slanted edge has direction (1.05, 1.86).
    slope = (1.05**2 + 1.86**2) ** 0.5
    triangle = torch.maximum(y - 0.86 * radius, (1.86 * ax - 1.05 * (y + radius)) / slope)
    bar = 0.34 * radius
    cross = torch.minimum(torch.maximum(ax - radius, ay - bar), torch.maximum(ay - radius, ax - bar))
    ring = (length - 0.74 * radius).abs() - 0.26 * radius
    diamond = (ax + ay - 1.1 * radius) / 2**0.5
    return torch.stack([circle, square, triangle, cross, ring, diamond])


def render(scenes: Scenes, world: World) -> Tensor:
    """Draws scenes with antialiased edges: uint8 `[N, size, size, 3]` on the scenes' device."""
    device = scenes.kind.device
    axis = torch.arange(world.size, device=device, dtype=torch.float32) + 0.5
    canvas = scenes.background[:, None, None, :].expand(-1, world.size, world.size, -1)
    palette = torch.tensor(RGB, dtype=torch.float32, device=device)
    for k in range(scenes.kind.shape[1]):
        x = axis[None, None, :] - scenes.center[:, k, 0, None, None]
        y = axis[None, :, None] - scenes.center[:, k, 1, None, None]
        x, y = torch.broadcast_tensors(x, y)
        distance = _distances(x, y, scenes.radius[:, k, None, None])
        index = scenes.kind[:, k].view(1, -1, 1, 1).expand(1, -1, world.size, world.size)
        alpha = (0.5 - distance.gather(0, index)[0]).clamp(0, 1) * scenes.present[:, k, None, None]
        ink = palette[scenes.color[:, k]][:, None, None, :]
        canvas = canvas + alpha[..., None] * (ink - canvas)
    return canvas.round().clamp(0, 255).to(torch.uint8)


def place(count: int, objects: int, world: World, generator: torch.Generator, device: torch.device) -> Tensor:
    """Cells `[count, objects]` (row * grid + column), no two of one scene touching, not even at a corner.

    Rejection from 24 candidates a scene; a scene whose candidates all fail keeps its best one, drawn with objects that
    touch (about 1 in 1,000 at four objects on a 6 x 6 grid).
    """
    grid = world.grid
    cells = torch.randint(grid * grid, (count, 24, objects), generator=generator, device=device)
    row, column = cells // grid, cells % grid
    gap = torch.maximum(
        (row[..., :, None] - row[..., None, :]).abs(), (column[..., :, None] - column[..., None, :]).abs()
    )
    gap = gap + grid * torch.eye(objects, dtype=gap.dtype, device=device)
    best = gap.flatten(2).amin(dim=2).clamp(max=2).argmax(dim=1)
    return cells[torch.arange(count, device=device), best]


def dress(
    kind: Tensor, color: Tensor, present: Tensor, cells: Tensor, world: World, generator: torch.Generator
) -> Scenes:
    """Adds to classes, colours and cells (each `[N, K]`) what captions leave open: jitter, size, background."""
    device, (count, objects) = kind.device, kind.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    corner = torch.stack([cells % world.grid, cells // world.grid], dim=-1).float()
    center = (corner + 0.5) * world.patch + (2 * uniform(count, objects, 2) - 1) * world.jitter
    low, high = world.radius
    return Scenes(
        kind=kind,
        color=color,
        present=present,
        center=center,
        radius=low + (high - low) * uniform(count, objects),
        tone=torch.randint(len(BACKGROUNDS), (count,), generator=generator, device=device),
    )


def scatter(
    count: int, objects: int, world: World, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Cells `[count, objects]` anywhere, all different; neighbours may touch."""
    return torch.rand(count, world.grid**2, generator=generator, device=device).argsort(dim=1)[:, :objects]


def any_scenes(cells: Tensor, world: World, generator: torch.Generator) -> Scenes:
    """Scenes of 0 to K objects of every class and colour on the first of `cells` `[N, K]`, held-out combinations too.

    Codec and judge know all combinations, so that a held-out score is about the language model alone.
    """
    (count, objects), device = cells.shape, cells.device

    def choice(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=device)

    kind, color = choice(len(CLASSES), count, objects), choice(len(COLORS), count, objects)
    present = torch.arange(objects, device=device) < choice(objects + 1, count, 1)
    return dress(kind, color, present, cells, world, generator)
