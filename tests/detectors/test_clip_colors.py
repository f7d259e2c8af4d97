"""The colour classifier, against crops and similarities computed one object at a time."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

open_clip = pytest.importorskip("open_clip", reason="the extra `geneval` is not installed: no open_clip")

from stage.detectors.clip_colors import COLORS, ClipColors, crop  # noqa: E402
from stage.types import ColorClassifier, Detection, NamesColors  # noqa: E402
from tests.detectors.tiny_clip import make_clip  # noqa: E402

TEN = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    torch.manual_seed(0)
    return make_clip(tmp_path_factory.mktemp("clip"))


def classifier(clip: tuple[str, Path], **changes: Any) -> ClipColors:
    arguments: dict[str, Any] = {"background": "#999", "batch_size": 4, "device": "cpu", "dtype": "float32"}
    return ClipColors(**{**arguments, "weights": str(clip[1]), "revision": None, "model": clip[0], **changes})


def scene(seed: int, objects: int, masks: bool) -> tuple[np.ndarray, list[Detection]]:
    """A random picture of coarse patches, and boxes on it, with or without masks."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    things = []
    for _ in range(objects):
        x0, y0 = rng.integers(0, 30), rng.integers(0, 20)
        box = (float(x0), float(y0), float(x0 + rng.integers(5, 30)), float(y0 + rng.integers(5, 25)))
        things.append(Detection(box, 0.9, rng.random((48, 64)) < 0.7 if masks else None))
    return image, things


@lru_cache
def towers(name: str, file: Path) -> tuple[Any, Any, Any]:
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=str(file))
    return model.eval(), transform, open_clip.get_tokenizer(name)


def naive(clip: tuple[str, Path], image: np.ndarray, name: str, thing: Detection) -> list[float]:
    """Ten cosines of one object, in float64 from the towers' features; the picture is painted pixel by pixel."""
    model, transform, _ = towers(*clip)
    painted = image.copy()
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            if thing.mask is not None and not thing.mask[y, x]:
                painted[y, x] = (0x99, 0x99, 0x99)
    x0, y0, x1, y1 = map(int, thing.box)
    cut = Image.fromarray(painted[y0:y1, x0:x1])
    with torch.no_grad():
        seen = model.encode_image(transform(cut)[None])[0].double()
    return [float(seen / seen.norm() @ naive_direction(clip, name, color)) for color in TEN]


def naive_direction(clip: tuple[str, Path], name: str, color: str) -> torch.Tensor:
    """The unit vector of a colour, in float64: each text's features are normalised before their mean is."""
    model, _, tokenizer = towers(*clip)
    texts = [
        f"a photo of a {color} {name}",
        f"a photo of a {color}-colored {name}",
        f"a photo of a {color} object",
    ]
    with torch.no_grad():
        words = model.encode_text(tokenizer(texts)).double()
    mean = torch.stack([row / row.norm() for row in words]).mean(0)
    return mean / mean.norm()


def test_directions_against_a_loop(clip: tuple[str, Path]) -> None:
    found = classifier(clip)._direction("sports ball")
    assert found.shape == (10, 24)
    for row, color in zip(found, TEN, strict=True):
        torch.testing.assert_close(
            row.double(), naive_direction(clip, "sports ball", color), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("masks", [False, True])
def test_colors_of_one_object_after_the_other(masks: bool, clip: tuple[str, Path]) -> None:
    """Seven objects in batches of four. Where two colours are within rounding of each other, either is right."""
    image, things = scene(1, 7, masks)
    named = classifier(clip).colors(image, "dog", things)
    assert len(named) == 7
    for color, thing in zip(named, things, strict=True):
        cosines = naive(clip, image, "dog", thing)
        assert cosines[TEN.index(color)] > max(cosines) - 1e-6


def test_the_answers_depend_on_the_picture(clip: tuple[str, Path]) -> None:
    """A test that any constant answer would pass is none: over 30 objects several colours are named."""
    image, things = scene(2, 30, False)
    assert len(set(classifier(clip).colors(image, "cat", things))) > 2


def test_the_mask_and_the_class_count(clip: tuple[str, Path]) -> None:
    found = classifier(clip)
    image, things = scene(3, 20, True)
    bare = [Detection(thing.box, thing.score) for thing in things]
    assert found.colors(image, "dog", things) != found.colors(image, "dog", bare)
    assert not torch.allclose(found._direction("dog"), found._direction("fire hydrant"), atol=1e-3)


def test_several_pictures_at_once(clip: tuple[str, Path]) -> None:
    """Crops of three pictures and two classes share batches; the answers are those of each alone."""
    found = classifier(clip)
    sights = [(*scene(4, 3, True), "dog"), (*scene(5, 0, False), "cat"), (*scene(6, 4, False), "cat")]
    views = [(image, name, things) for image, things, name in sights]
    together = found.colors_in_batches(views)
    assert [len(names) for names in together] == [3, 0, 4]
    assert together == [found.colors(image, name, things) for image, name, things in views]
    assert found.colors_in_batches([]) == []


def test_a_crop_by_hand() -> None:
    """2 x 3 pixels; the box takes the right column, the mask holds its lower pixel, the upper one turns #999."""
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    mask = np.array([[True, True, False], [False, True, True]])
    cut = np.asarray(crop(image, Detection((2.0, 0.0, 3.0, 2.0), 0.5, mask), (0x99, 0x99, 0x99)))
    assert cut.tolist() == [[[153, 153, 153]], [[15, 16, 17]]]
    plain = np.asarray(crop(image, Detection((1.6, 0.4, 3.0, 2.0), 0.5), (0, 0, 0)))
    assert plain.tolist() == [[[6, 7, 8]], [[15, 16, 17]]]
    assert image[0, 2].tolist() == [6, 7, 8]


def test_it_is_a_classifier_that_names_its_colors(clip: tuple[str, Path]) -> None:
    found = classifier(clip)
    assert isinstance(found, ColorClassifier) and isinstance(found, NamesColors) and COLORS == TEN
    digest = hashlib.sha256(clip[1].read_bytes()).hexdigest()
    assert found.provenance == {"path": str(clip[1]), "revision": None, "sha256": {"clip.pt": digest}}


def test_bfloat16_stays_near(clip: tuple[str, Path]) -> None:
    exact, rough = classifier(clip)._direction("dog"), classifier(clip, dtype="bfloat16")._direction("dog")
    assert float((exact * rough).sum(-1).min()) > 0.995
    assert (
        len(classifier(clip, dtype="bfloat16").colors(*scene(1, 2, False)[:1], "dog", scene(1, 2, False)[1]))
        == 2
    )


def test_what_does_not_fit_is_refused(clip: tuple[str, Path], tmp_path: Path) -> None:
    image, _ = scene(1, 0, False)
    with pytest.raises(ValueError, match="an object's box holds a pixel"):
        classifier(clip).colors(image, "dog", [Detection((3.0, 3.0, 3.2, 9.0), 0.9)])
    with pytest.raises(ValueError, match=r"a mask has the size of its picture \(48, 64\), got \(2, 2\)"):
        classifier(clip).colors(
            image, "dog", [Detection((3.0, 3.0, 8.0, 9.0), 0.9, np.ones((2, 2), dtype=bool))]
        )
    with pytest.raises(ValueError, match="an architecture of open_clip, got 'ViT-L-41'"):
        classifier(clip, model="ViT-L-41")
    with pytest.raises(
        FileNotFoundError, match=r"before the first rollout.*hf download timm/vit_large_patch14"
    ):
        classifier(clip, weights=str(tmp_path))
    torch.save({"visual.proj": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"weights are a state dict that open_clip loads into tiny-clip.*other\.pt"
    ):
        classifier(clip, weights=str(tmp_path / "other.pt"))


def test_the_recipe_is_that_of_openai() -> None:
    """ViT-L/14 with QuickGELU, 224 pixels, and the constants by which OpenAI's weights want pictures."""
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    assert config["quick_gelu"] and config["vision_cfg"]["patch_size"] == 14 and config["embed_dim"] == 768
    assert pytest.approx((0.48145466, 0.4578275, 0.40821073)) == open_clip.OPENAI_DATASET_MEAN
    assert pytest.approx((0.26862954, 0.26130258, 0.27577711)) == open_clip.OPENAI_DATASET_STD


def test_pictures_are_normalised_by_these_constants(clip: tuple[str, Path]) -> None:
    """A grey of 153: (0.6 - 0.48145466) / 0.26862954 = 0.44130, and so on for green and blue."""
    pixels = classifier(clip).transform(Image.new("RGB", (32, 32), "#999"))
    assert pixels.shape == (3, 32, 32)
    expected = [
        (0.6 - m) / s
        for m, s in zip(
            (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), strict=True
        )
    ]
    assert pixels.mean((1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_small_card_halves_the_batch(
    clip: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory for two crops: five are tried, then two at a time, and the colours are the same."""
    judge, tried = classifier(clip, batch_size=5), []
    image, objects = scene(3, 5, masks=True)
    expected, encode = judge.colors(image, "dog", objects), judge.clip.encode_image

    def small(pixels: torch.Tensor) -> torch.Tensor:
        tried.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(judge.clip, "encode_image", small)
    assert judge.colors(image, "dog", objects) == expected and len(set(expected)) > 1
    assert tried == [5, 2, 2, 1] and "goes on with batch_size 2" in caplog.text
