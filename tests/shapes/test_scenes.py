"""Scenes are drawn as they say, and cells keep their distance."""

from __future__ import annotations

import math

import pytest
import torch

from stage.shapes.scenes import (
    BACKGROUNDS,
    CLASSES,
    COLORS,
    RGB,
    Scenes,
    World,
    any_scenes,
    place,
    render,
    scatter,
)


def one(kind: str, radius: float = 7.0, center: tuple[float, float] = (40.0, 56.0)) -> Scenes:
    """A single red object on the first background."""
    return Scenes(
        kind=torch.tensor([[CLASSES.index(kind)]]),
        color=torch.tensor([[COLORS.index("red")]]),
        present=torch.tensor([[True]]),
        center=torch.tensor([[center]]),
        radius=torch.tensor([[radius]]),
        tone=torch.tensor([0]),
    )


def ink(scenes: Scenes) -> torch.Tensor:
    """Share of each pixel that is covered, read back from the red channel: (b - p) / (b - r) with b = 196, r = 218."""
    image = render(scenes, World())[0, ..., 1].double()  # green: background 196, red ink 38
    return (196 - image) / (196 - 38)


# Areas in squares of the radius r: circle pi; square (2 * 0.86)^2; triangle 2.1 * 1.86 / 2; cross of two bars
# 2 x 0.68 less their overlap; ring pi (1 - 0.48^2); diamond 2 * 1.1^2.
AREAS = {
    "circle": math.pi,
    "square": 1.72**2,
    "triangle": 2.1 * 1.86 / 2,
    "cross": 2 * 2 * 0.68 - 0.68**2,
    "ring": math.pi * (1 - 0.48**2),
    "diamond": 2 * 1.1**2,
}


@pytest.mark.parametrize("kind", CLASSES)
def test_area_and_centre_of_each_class(kind: str) -> None:
    covered = ink(one(kind))
    # A pixel edge of 44 pixels circumference quantised to 1/158 and antialiased over one pixel: well within 3 %.
    assert covered.sum().item() == pytest.approx(AREAS[kind] * 49, rel=0.03)
    axis = torch.arange(96, dtype=torch.float64) + 0.5
    x = (covered.sum(dim=0) * axis).sum() / covered.sum()
    y = (covered.sum(dim=1) * axis).sum() / covered.sum()
    assert x.item() == pytest.approx(40.0, rel=2e-3)
    # The centroid of the triangle lies a third of its height above its base: 56 + 7 (0.86 - 1.86 / 3) = 57.68.
    assert y.item() == pytest.approx(57.68 if kind == "triangle" else 56.0, rel=2e-3)


@pytest.mark.parametrize("kind", CLASSES)
def test_box_holds_the_ink_tightly(kind: str) -> None:
    scenes = one(kind)
    rows, columns = (ink(scenes) > 0.5).nonzero(as_tuple=True)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # Half-covered pixels are off by at most a pixel; sharp tips (triangle, diamond) lose at most one more.
    for edge, truth in zip(seen, scenes.boxes()[0, 0].tolist(), strict=True):
        assert abs(float(edge) - truth) <= 2.0


def test_absent_objects_leave_a_plain_background() -> None:
    scenes = one("circle")
    scenes.present[:] = False
    assert render(scenes, World()).unique(dim=2).shape[2] == 1
    assert render(scenes, World())[0, 0, 0].tolist() == list(BACKGROUNDS[0])


def test_backgrounds_are_far_from_every_colour() -> None:
    gaps = [
        max(abs(a - b) for a, b in zip(tone, ink_rgb, strict=True)) for tone in BACKGROUNDS for ink_rgb in RGB
    ]
    assert min(gaps) >= 40


def test_objects_hardly_ever_touch() -> None:
    cells = place(4000, 4, World(), torch.Generator().manual_seed(5), torch.device("cpu"))
    row, column = cells // 6, cells % 6
    gap = torch.maximum((row[:, :, None] - row[:, None]).abs(), (column[:, :, None] - column[:, None]).abs())
    touching = (gap + 9 * torch.eye(4, dtype=gap.dtype) < 2).any(dim=(1, 2))
    assert touching.float().mean() < 0.003  # unplaced at random, two in three would


def test_an_object_stays_in_its_patch() -> None:
    cells = scatter(2000, 8, World(), torch.Generator().manual_seed(6), torch.device("cpu"))
    assert all(len(set(row)) == 8 for row in cells.tolist())
    scenes = any_scenes(cells, World(), torch.Generator().manual_seed(7))
    corner = 16.0 * torch.stack([cells % 6, cells // 6], dim=-1)
    boxes = scenes.boxes()
    assert (boxes[..., :2] >= corner).all()
    assert (boxes[..., 2:] <= corner + 16).all()


def test_any_scenes_show_all_combinations_and_counts() -> None:
    cells = scatter(2000, 4, World(), torch.Generator().manual_seed(8), torch.device("cpu"))
    scenes = any_scenes(cells, World(), torch.Generator().manual_seed(9))
    shown = (scenes.kind * len(COLORS) + scenes.color)[scenes.present]
    assert len(shown.unique()) == 60
    assert scenes.present.sum(dim=1).unique().tolist() == [0, 1, 2, 3, 4]
