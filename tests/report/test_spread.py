"""The spread of the images of a prompt, on grids whose pixels are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stage.callbacks import grid
from stage.report.ablation import ablate
from stage.report.read import read_run
from stage.report.spread import cut_grid, grid_spread, spread
from tests.report.example import write_config, write_metrics


def test_a_grid_is_cut_as_training_pasted_it() -> None:
    images = torch.randint(0, 256, (3, 4, 8, 8, 3), dtype=torch.uint8)
    cut = cut_grid(np.asarray(grid(images)), columns=4)
    assert cut is not None and np.array_equal(cut, images.numpy())
    assert cut_grid(np.asarray(grid(images)), columns=3) is None


def test_spread_by_hand() -> None:
    """Three flat images of 0, 51 and 255: they differ by 0.2, 0.8 and 1, and a prompt of equal ones by nothing."""
    levels = np.array([[0, 51, 255], [7, 7, 7]], np.uint8)
    images = np.broadcast_to(levels[:, :, None, None, None], (2, 3, 4, 4, 3))
    assert spread(images) == pytest.approx((0.2 + 1.0 + 0.8) / 3 / 2)


def test_a_difference_in_one_pixel_is_its_root_mean_square() -> None:
    images = np.zeros((1, 2, 2, 2, 3), np.uint8)
    images[0, 0, 0, 0, 0] = 255
    assert spread(images) == pytest.approx((1 / 12) ** 0.5)


def test_a_run_that_draws_one_picture_loses_its_spread(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_config(tmp_path, "grpo", 0, callbacks={"images": {"samples": 2}})
    (tmp_path / "images").mkdir()
    for update, levels in ((0, (0, 255)), (30, (9, 9))):
        pixels = torch.tensor(levels, dtype=torch.uint8)[None, :, None, None, None].expand(1, 2, 8, 8, 3)
        grid(pixels).save(tmp_path / "images" / f"update_{update:05d}.png")
    run = read_run(tmp_path)
    assert grid_spread(run, 0) == pytest.approx(1.0) and grid_spread(run, 30) == 0.0
    assert grid_spread(run, 20) is None
    table = next(t for t in ablate([str(tmp_path)], None).tables if t.title.startswith("spread"))
    assert table.rows[0].to_base is not None and table.rows[0].to_base.mean == pytest.approx(-1.0)
    assert table.rows[0].to_base.sign == 0  # a change, neither good nor bad


def test_a_picture_of_another_shape_has_no_spread(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    write_config(tmp_path, "grpo", 0, callbacks={"images": {"samples": 2}})
    (tmp_path / "images").mkdir()
    Image.new("RGB", (7, 5)).save(tmp_path / "images" / "update_00000.png")
    assert grid_spread(read_run(tmp_path), 0) is None
