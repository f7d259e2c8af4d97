"""Maps over images, pixel by pixel, and figures that can be saved."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from stage.diagnostics.maps import STRENGTH, Layer, conflict_chart, map_sheet, overlay


def test_a_token_colours_its_own_patch() -> None:
    """Four tokens over 4 x 4 pixels: each has the colour of its value over the grey of the image."""
    image = np.full((4, 4, 3), 100, np.uint8)
    found = overlay(image, np.array([0.0, 1.0, 0.5, 7.0]), 0.0, 1.0, "viridis")
    for value, (row, column) in zip((0.0, 1.0, 0.5, 1.0), ((0, 0), (0, 2), (2, 0), (2, 2)), strict=True):
        color = np.array(matplotlib.colormaps["viridis"](value)[:3])
        expected = np.round(255 * (STRENGTH * color + (1 - STRENGTH) * 100 / 255))
        assert np.array_equal(found[row : row + 2, column : column + 2], np.broadcast_to(expected, (2, 2, 3)))


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 tokens"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros(3), 0, 1, "viridis")
    with pytest.raises(ValueError, match=r"for \(5, 4\) pixels"):
        overlay(np.zeros((5, 4, 3), np.uint8), np.zeros(4), 0, 1, "viridis")


def test_a_sheet_has_a_row_a_sample_and_a_column_a_layer(tmp_path: Path) -> None:
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    layers = [Layer(name, torch.rand(2, 4), 0, 1, "viridis") for name in ("s", "w")]
    figure = map_sheet(images, layers, ["r 1", "r 0"], "a <prompt>")
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 2 * 3
    figure.savefig(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 50


def test_the_chart_takes_empty_bins(tmp_path: Path) -> None:
    figure = conflict_chart({"all": [float("nan"), 0.5]}, [-1.0, 0.0, 1.0], [0, 10])
    figure.savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
