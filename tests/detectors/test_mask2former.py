"""The detector: golden logits and instances of mmdet, batches, and what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("cv2", reason="the extra `geneval` is not installed: no OpenCV")

from stage.detectors.coco import CLASS_NAMES
from stage.detectors.mask2former import Mask2FormerDetector
from stage.detectors.mask2former_pipeline import Frame, frame, instances, prepare
from stage.types import Detector, NamesClasses
from tests.detectors.tiny_mask2former import in_mmdet, save_checkpoint, tiny_model

ARGUMENTS: dict[str, Any] = {
    "revision": None,
    "min_score": 0.0,
    "max_per_image": 100,
    "scale": [96, 64],
    "round_pixels": True,
    "batch_size": 2,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_checkpoint(tmp_path_factory.mktemp("weights"))


def detector(checkpoint: Path, **changes: Any) -> Mask2FormerDetector:
    return Mask2FormerDetector(str(checkpoint), **{**ARGUMENTS, **changes})


def pictures(count: int, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_logits_and_instances_of_mmdet(shared: Path) -> None:
    """The golden file: a small Mask2Former of mmdet 3.3, its input, logits and the instances of the first picture."""
    file = shared / "golden" / "mask2former_mini_mmdet.pt"
    golden = torch.load(file, weights_only=True)
    found = detector(file)
    classes, masks = found.logits(golden["pixels"])
    torch.testing.assert_close(classes, golden["class_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(masks, golden["mask_logits"], atol=1e-4, rtol=0)
    size = tuple(golden["pixels"].shape[2:])
    objects = instances(classes[0], masks[0], Frame(size, size, size), max_per_image=100, min_score=0.0)
    expected = golden["instances"]
    ours = sorted(zip(objects.labels.tolist(), objects.scores.tolist(), objects.boxes.tolist(), strict=True))
    theirs = sorted(
        zip(
            expected["labels"].tolist(), expected["scores"].tolist(), expected["bboxes"].tolist(), strict=True
        )
    )
    assert len(ours) == len(theirs) == 100
    for (label, score, box), (their_label, their_score, their_box) in zip(ours, theirs, strict=True):
        assert label == their_label and abs(score - their_score) < 1e-5
        assert max(abs(a - b) for a, b in zip(box, their_box, strict=True)) < 1


def test_classes_are_those_of_geneval(shared: Path) -> None:
    names = (shared / "data" / "coco_object_names.txt").read_text(encoding="utf-8").split("\n")
    assert list(CLASS_NAMES) == [name for name in names if name]


def test_it_is_a_detector_that_names_its_classes(checkpoint: Path) -> None:
    found = detector(checkpoint)
    assert isinstance(found, Detector) and isinstance(found, NamesClasses)
    assert len(set(found.class_names)) == 80
    assert found.provenance == {
        "path": str(checkpoint),
        "revision": None,
        "sha256": {"tiny.pth": hashlib.sha256(checkpoint.read_bytes()).hexdigest()},
    }


def test_each_picture_as_alone(checkpoint: Path) -> None:
    """Three pictures in batches of two: the objects of each are those of the steps by hand, in order of confidence."""
    images, found = pictures(3), detector(checkpoint)
    batched = found.detect(images)
    assert len(batched) == 3
    sizes = frame((40, 56), (96, 64))
    for image, objects in zip(images, batched, strict=True):
        classes, masks = found.logits(prepare(image[None], sizes, True, torch.device("cpu")))
        alone = instances(classes[0], masks[0], sizes, 100, 0.0)
        assert sum(map(len, objects.values())) == 100
        for name, things in objects.items():
            mine = alone.labels == CLASS_NAMES.index(name)
            scores = sorted(alone.scores[mine].tolist(), reverse=True)
            assert [thing.score for thing in things] == pytest.approx(scores, abs=1e-5)
            for thing in things:
                nearest = int(((alone.scores - thing.score).abs() + 10 * ~mine).argmin())
                assert thing.mask is not None and thing.mask.shape == (40, 56) and thing.mask.dtype == bool
                assert np.mean(thing.mask != alone.masks[nearest].numpy()) < 0.01
                rows, columns = np.nonzero(thing.mask)
                if len(rows):
                    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                    assert thing.box == tuple(map(float, box))


def test_what_is_below_the_lowest_score_is_left_out(checkpoint: Path) -> None:
    images = pictures(1)
    everything = detector(checkpoint).detect(images)[0]
    scores = sorted((thing.score for things in everything.values() for thing in things), reverse=True)
    limit = (scores[9] + scores[10]) / 2
    few = detector(checkpoint, min_score=limit).detect(images)[0]
    left = sorted((thing.score for things in few.values() for thing in things), reverse=True)
    assert left == pytest.approx(scores[:10], abs=1e-6)
    assert detector(checkpoint, min_score=1.0).detect(images) == [{}]


def test_both_layouts_see_the_same(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    old = save_checkpoint(tmp_path, layout=2)
    images = pictures(1)
    found, expected = (detector(file).detect(images)[0] for file in (old, checkpoint))
    assert found.keys() == expected.keys()
    for name, things in found.items():
        assert [thing.score for thing in things] == pytest.approx([thing.score for thing in expected[name]])


def test_bfloat16_stays_near(checkpoint: Path) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    classes, masks = detector(checkpoint, dtype="bfloat16").logits(pixels)
    expected, _ = detector(checkpoint).logits(pixels)
    assert classes.dtype == masks.dtype == torch.float32
    assert (classes - expected).abs().mean() < 0.1 * expected.std()


def test_a_picture_of_one_pixel_and_no_picture(checkpoint: Path) -> None:
    found = detector(checkpoint)
    assert found.detect(np.zeros((0, 8, 8, 3), dtype=np.uint8)) == []
    assert len(found.detect(np.full((1, 1, 1, 3), 200, dtype=np.uint8))) == 1


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 3), dtype=np.float32),
        np.zeros((8, 8, 3), dtype=np.uint8),
        np.zeros((1, 8, 8, 4), dtype=np.uint8),
        np.zeros((1, 0, 8, 3), dtype=np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(images: np.ndarray, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"pictures are uint8 \[N, H, W, 3\]"):
        detector(checkpoint).detect(images)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"min_score": 1.5}, "min_score lies in"),
        ({"scale": [800]}, "scale is two sides"),
        ({"scale": [800, 0]}, "scale is two sides"),
        ({"batch_size": 0}, "batch_size of Mask2Former is a whole number"),
        ({"max_per_image": True}, "max_per_image is a whole number"),
        ({"dtype": "int8"}, "dtype is one of"),
    ],
)
def test_arguments_out_of_range_are_refused(changes: dict[str, Any], text: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=text):
        detector(checkpoint, **changes)


def test_missing_weights_say_what_to_download(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "weights.pth"):
        with pytest.raises(
            FileNotFoundError, match=r"before the first rollout.*mim download mmdet --config mask2former"
        ):
            detector(path)


def test_other_classes_and_broken_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": in_mmdet(tiny_model(labels=5), 3)}, tmp_path / "five.pth")
    with pytest.raises(ValueError, match=r"the classes are the 80 of COCO, .*five\.pth tells 5 apart"):
        detector(tmp_path / "five.pth")
    state = in_mmdet(tiny_model(), 3)
    state["panoptic_head.cls_embed.bias"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="logits are finite"):
        detector(tmp_path / "nan.pth").detect(pictures(1))


def test_a_small_card_halves_the_batch(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory for two pictures: five are tried, then two at a time, and each is seen as before."""
    finder, images, tried = detector(checkpoint, batch_size=5, min_score=0.0), pictures(5), []
    expected = finder.detect(images)

    def small(batch: np.ndarray, *rest: Any) -> torch.Tensor:
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prepare(batch, *rest)

    monkeypatch.setattr("stage.detectors.mask2former.prepare", small)
    found = finder.detect(images)
    assert tried == [5, 2, 2, 1] and "goes on with batch_size 2" in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        for name in one:
            assert [thing.score for thing in one[name]] == pytest.approx(
                [t.score for t in other[name]], abs=1e-5
            )
