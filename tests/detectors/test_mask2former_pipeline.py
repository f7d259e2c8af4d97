"""mmdet's steps before and after Mask2Former, against arithmetic by hand and slow loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2", reason="the extra `geneval` is not installed: no OpenCV")

from stage.detectors.mask2former_pipeline import (  # noqa: E402
    MEAN,
    STD,
    Frame,
    boxes,
    frame,
    instances,
    prepare,
)

CPU = torch.device("cpu")
SCALE = (1333, 800)


@pytest.mark.parametrize(
    ("original", "resized", "padded"),
    [
        ((384, 384), (800, 800), (800, 800)),  # the shorter side bounds: 800 / 384
        (
            (100, 300),
            (444, 1333),
            (448, 1344),
        ),  # the longer side bounds: 1333 / 300 = 4.4433; 444.33 + .5 -> 444
        ((300, 100), (1333, 444), (1344, 448)),
        ((480, 640), (800, 1067), (800, 1088)),  # 800 / 480 * 640 = 1066.67, rounded up
        ((640, 480), (1067, 800), (1088, 800)),
        ((1600, 1600), (800, 800), (800, 800)),  # made smaller
        ((3, 2), (1200, 800), (1216, 800)),
    ],
)
def test_sizes_by_hand(original: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]) -> None:
    assert frame(original, SCALE) == Frame(original, resized, padded)


def test_half_a_pixel_is_rounded_up() -> None:
    """Bounds 15 and 10 of a picture 4 x 5: factor min(15 / 5, 10 / 4) = 2.5, so 10 x 12.5, and 12.5 becomes 13."""
    assert frame((4, 5), (15, 10)).resized == (10, 13)


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel of `[height, width]` from the four around its centre in `values`, in float64, edges repeated."""
    rows, columns = values.shape[:2]
    found = np.zeros((height, width, *values.shape[2:]))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * rows / height - 0.5, 0.0), rows - 1.0)
            x = min(max((j + 0.5) * columns / width - 0.5, 0.0), columns - 1.0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            dy, dx = y - y0, x - x0
            found[i, j] = (
                values[y0, x0] * (1 - dy) * (1 - dx)
                + values[y0, x1] * (1 - dy) * dx
                + values[y1, x0] * dy * (1 - dx)
                + values[y1, x1] * dy * dx
            )
    return found


@pytest.mark.parametrize("round_pixels", [True, False])
def test_pixels_against_a_loop(round_pixels: bool) -> None:
    """Resized, from grey levels to deviations in the order red, green, blue, and zeros below and to the right."""
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), dtype=np.uint8)
    sizes = frame((9, 14), (50, 30))
    assert sizes == Frame((9, 14), (30, 47), (32, 64))
    found = prepare(images, sizes, round_pixels, CPU)
    assert found.shape == (2, 3, 32, 64) and found.dtype == torch.float32
    # For whole grey levels OpenCV counts in whole numbers throughout and may be off by one level at most.
    tolerance = 1.0 if round_pixels else 1e-3
    for n in range(2):
        expected = bilinear(images[n].astype(np.float64), 30, 47)
        levels = found[n, :, :30, :47].double().permute(1, 2, 0).numpy() * np.array(STD) + np.array(MEAN)
        assert np.abs(levels - expected).max() < tolerance
        assert np.abs(levels - levels.round()).max() < 1e-3 or not round_pixels
    assert not found[:, :, 30:].any() and not found[:, :, :, 47:].any()


def test_a_picture_of_the_right_size_is_only_normalised() -> None:
    """(255 - 123.675) / 58.395 = 2.24891; (0 - 116.28) / 57.12 = -2.03571; (128 - 103.53) / 57.375 = 0.42649."""
    images = np.tile(np.array([255, 0, 128], dtype=np.uint8), (1, 32, 32, 1))
    found = prepare(images, frame((32, 32), (32, 32)), True, CPU)
    expected = torch.tensor([2.248908, -2.035714, 0.426492])
    torch.testing.assert_close(found, expected[None, :, None, None].expand(1, 3, 32, 32), atol=1e-5, rtol=0)


def naive_instances(
    classes: np.ndarray, masks: np.ndarray, sizes: Frame, most: int
) -> list[tuple[float, int, tuple[float, ...], np.ndarray]]:
    """(score, label, box, mask) of the best pairs of query and class, in float64 and without sharing anything."""
    pairs = []
    for query, row in enumerate(classes):
        weights = [math.exp(value - max(row)) for value in row]
        pairs += [(weight / sum(weights), query, label) for label, weight in enumerate(weights[:-1])]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:most]:
        large = bilinear(masks[query], *sizes.padded)[: sizes.resized[0], : sizes.resized[1]]
        logits = bilinear(large, *sizes.original)
        inside = [1 / (1 + math.exp(-value)) for value in logits.flatten() if value > 0]
        score = probability * sum(inside) / (len(inside) + 1e-6)
        rows, columns = np.nonzero(logits > 0)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
        found.append((score, label, tuple(map(float, box)), logits > 0))
    return found


@pytest.mark.parametrize("min_score", [0.0, 0.2])
def test_objects_against_a_loop(min_score: float) -> None:
    rng = np.random.default_rng(1)
    classes, masks = rng.normal(0, 2, (5, 4)), rng.normal(-0.5, 3, (5, 8, 16))
    masks[3], classes[3, 0] = -1.0, 6.0  # a sure query without a pixel: box and score are 0
    sizes = Frame((20, 33), (29, 47), (32, 64))
    found = instances(
        torch.tensor(classes).float(),
        torch.tensor(masks).float(),
        sizes,
        max_per_image=9,
        min_score=min_score,
    )
    expected = [one for one in naive_instances(classes, masks, sizes, 9) if one[0] >= min_score]
    assert len(expected) == (3 if min_score else 9) and (min(one[0] for one in expected) == 0) == (
        not min_score
    )
    order = sorted(range(len(found.scores)), key=lambda i: (-float(found.scores[i]), int(found.labels[i])))
    expected.sort(key=lambda one: (-one[0], one[1]))
    assert len(order) == len(expected)
    for i, (score, label, box, mask) in zip(order, expected, strict=True):
        assert abs(float(found.scores[i]) - score) < 1e-5 and int(found.labels[i]) == label
        assert tuple(found.boxes[i].tolist()) == box
        assert np.array_equal(found.masks[i].numpy(), mask)


def test_no_object_at_all() -> None:
    nothing = torch.tensor([[-9.0, -9.0, 9.0]])
    found = instances(nothing, torch.zeros(1, 4, 4), frame((8, 6), (16, 16)), 100, 0.3)
    assert found.scores.shape == (0,) and found.boxes.shape == (0, 4) and found.masks.shape == (0, 8, 6)


def test_boxes_by_hand() -> None:
    masks = torch.zeros(3, 4, 6, dtype=torch.bool)
    masks[0, 1, 2] = True
    masks[1, 0, 1] = masks[1, 3, 5] = True
    assert boxes(masks).tolist() == [[2.0, 1.0, 3.0, 2.0], [1.0, 0.0, 6.0, 4.0], [0.0, 0.0, 0.0, 0.0]]
