"""The GenEval reward: shapes, parts and reasons with a detector that reads its answers off the pixels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stage.rewards.geneval import GenEvalReward
from stage.shapes.detector import ShapeDetector
from stage.types import ChecksPrompts, Detection, Detections, Prompt, Scorer
from tests.rewards.hard_times import refuses_bad_images

NAMES = {1: "dog", 2: "cat"}
COLORS = {10: "red", 20: "blue"}
NUMBERS: dict[str, Any] = {
    "partial": "bounded",
    "weights": {"partial": 1.0, "strict": 0.0},
    "threshold": 0.3,
    "counting_threshold": 0.9,
    "max_objects": 16,
    "nms_threshold": 1.0,
    "position_margin": 0.1,
}


class PixelDetector:
    """Every pixel that is not black is an object; its channels are class, colour and score in %."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def detect(self, images: np.ndarray) -> list[Detections]:
        self.calls.append(images.shape)
        assert images.dtype == np.uint8
        return [self._objects(image) for image in images]

    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
        return [COLORS[int(image[int(seen.box[1]), int(seen.box[0]), 1])] for seen in objects]

    def _objects(self, image: np.ndarray) -> Detections:
        found: dict[str, list[Detection]] = {}
        for y, x in zip(*np.nonzero(image[..., 0]), strict=True):
            box = (float(x), float(y), x + 1.0, y + 1.0)
            found.setdefault(NAMES[int(image[y, x, 0])], []).append(Detection(box, image[y, x, 2] / 100))
        return found


class Knowing(PixelDetector):
    """A detector that says what it can tell."""

    class_names = ("dog", "cat")
    color_names = ("red", "blue")


def picture(*objects: tuple[int, int, int, int]) -> Tensor:
    """uint8 [4, 8, 3] with objects (x, y, class, colour), each of score 0.95."""
    image = torch.zeros(4, 8, 3, dtype=torch.uint8)
    for x, y, name, color in objects:
        image[y, x] = torch.tensor([name, color, 95], dtype=torch.uint8)
    return image


def prompt(*include: dict[str, Any], tag: str = "any") -> Prompt:
    return Prompt(id=0, text="a photo", metadata={"tag": tag, "include": list(include), "prompt": "a photo"})


DOG: dict[str, Any] = {"class": "dog", "count": 1}
RED_DOG = prompt({**DOG, "color": "red"})
CAT_LEFT_OF_DOG = prompt(DOG, {"class": "cat", "count": 1, "position": ["left of", 0]})
EMPTY, RED, BLUE = picture(), picture((1, 1, 1, 10)), picture((1, 1, 1, 20))
THREE = picture((0, 0, 1, 10), (3, 0, 1, 10), (6, 0, 1, 10))
CAT_LEFT = picture((6, 1, 1, 10), (0, 1, 2, 10))
CAT_RIGHT = picture((0, 1, 1, 10), (6, 1, 2, 10))
GROUPS = ([RED, BLUE, EMPTY, THREE], [CAT_LEFT, CAT_RIGHT, RED, EMPTY])
IMAGES = torch.stack([torch.stack(group) for group in GROUPS])
PROMPTS = (RED_DOG, CAT_LEFT_OF_DOG)


def reward(detector: Any = None, color_classifier: Any = None, **changes: Any) -> GenEvalReward:
    return GenEvalReward(detector or PixelDetector(), color_classifier, **{**NUMBERS, **changes})


def test_parts_of_two_groups() -> None:
    scorer = reward()
    assert isinstance(scorer, Scorer)
    scores = scorer(IMAGES, PROMPTS)
    assert scores.names == ("partial", "strict") and scores.weights == (1.0, 0.0)
    assert scores.parts.dtype == torch.float32 and scores.parts.shape == (2, 4, 2)
    # A red dog: (1 + 1) / 2, (1 + 0) / 2, (0 + 0) / 2 twice. A cat left of a dog: (1 + 1 + 1) / 3,
    # (1 + 1 + 0) / 3, (1 + 0 + 0) / 3, 0.
    partial = torch.tensor([[1, 1 / 2, 0, 0], [1, 2 / 3, 1 / 3, 0]])
    torch.testing.assert_close(scores.parts[..., 0], partial, atol=1e-7, rtol=0)
    assert scores.parts[..., 1].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


def test_released_and_the_verdict_of_the_benchmark() -> None:
    scorer = reward(partial="released", weights={"correct": 2.0, "partial": 0.5})
    scores = scorer(IMAGES, PROMPTS)
    assert scores.names == ("correct", "partial") and scores.weights == (2.0, 0.5)
    assert scores.parts[..., 0].tolist() == [[1, 0, 0, 1], [1, 0, 0, 0]]  # three dogs are at least one
    # Three dogs: (1 - 2 + 0) / 2. A cat on the wrong side: (1 + 1 + 0 + 1) / 4.
    assert scores.parts[..., 1].tolist() == [[1, 0.5, 0, -0.5], [1, 0.75, pytest.approx(1 / 3), 0]]


def test_reasons_in_words() -> None:
    reasons = reward()(IMAGES, PROMPTS).reasons
    assert [len(group) for group in reasons] == [4, 4]
    assert reasons[0][0] == reasons[1][0] == "as asked"
    assert reasons[0][1].startswith("wrong: ") and "red dog" in reasons[0][1]
    assert reasons[0][3].startswith("correct, but not strictly: ") and "found 3" in reasons[0][3]
    assert "cat left of dog" in reasons[1][1]


def test_the_detector_sees_all_pictures_at_once() -> None:
    detector = PixelDetector()
    reward(detector)(IMAGES, PROMPTS)
    assert detector.calls == [(8, 4, 8, 3)]


def test_groups_do_not_touch_each_other() -> None:
    """Swapping prompts and their groups swaps the scores; a picture alone scores as it does in a batch."""
    scores = reward()(IMAGES, PROMPTS)
    swapped = reward()(IMAGES.flip(0), PROMPTS[::-1])
    assert torch.equal(swapped.parts, scores.parts.flip(0)) and swapped.reasons == scores.reasons[::-1]
    for p in range(2):
        for g in range(4):
            alone = reward()(IMAGES[p : p + 1, g : g + 1], PROMPTS[p : p + 1])
            assert torch.equal(alone.parts[0, 0], scores.parts[p, g])


def test_thresholds_reach_the_judge() -> None:
    counting = prompt(DOG, tag="counting")
    assert reward()(RED[None, None], (counting,)).parts[0, 0, 0] == 1
    assert reward(counting_threshold=0.96)(RED[None, None], (counting,)).parts[0, 0, 0] == 0
    assert reward(threshold=0.96)(RED[None, None], (counting,)).parts[0, 0, 0] == 1


def test_a_classifier_of_its_own() -> None:
    class AllBlue:
        def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
            return ["blue" for _ in objects]

    assert reward(color_classifier=AllBlue())(RED[None, None], (RED_DOG,)).parts[0, 0].tolist() == [0.5, 0]


class Failing(PixelDetector):
    def detect(self, images: np.ndarray) -> list[Detections]:
        raise RuntimeError("no weights")


class Short(PixelDetector):
    def detect(self, images: np.ndarray) -> list[Detections]:
        return super().detect(images)[1:]


class Colorless(PixelDetector):
    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
        raise KeyError("palette")


class NotANumber(PixelDetector):
    def detect(self, images: np.ndarray) -> list[Detections]:
        return [{"dog": [Detection((0, 0, 1, 1), float("nan"))]} for _ in images]


@pytest.mark.parametrize(
    ("detector", "words"),
    [
        (Failing, "Failing failed on 8 of shape .*no weights.* no reward was made up"),
        (Short, "one mapping for each picture, Short gave 7 for 8"),
        (Colorless, "Colorless failed on 1 'dog'.*palette.* no reward was made up"),
        (NotANumber, "finite"),
    ],
)
def test_a_failure_is_no_reward(detector: Callable[[], PixelDetector], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reward(detector())(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (Prompt(0, "a dog"), "'a dog' cannot be scored: tag must be"),
        (Prompt(0, "a dog", {"tag": "x"}), "'a dog' cannot be scored: include must list"),
        (prompt({"class": "dog", "count": 0}), "positive integer"),
    ],
)
def test_a_prompt_without_requirements_is_no_reward(bad: Prompt, words: str) -> None:
    detector = PixelDetector()
    with pytest.raises(ValueError, match=words):
        reward(detector)(IMAGES, (RED_DOG, bad))
    assert not detector.calls  # found out before any picture is looked at


def test_prompts_outside_the_vocabulary_are_refused() -> None:
    assert reward(Knowing())(IMAGES, PROMPTS).parts.shape == (2, 4, 2)
    unknown = prompt({"class": "zebra", "count": 1})
    assert reward(PixelDetector())(RED[None, None], (unknown,)).parts[0, 0, 0] == 0
    with pytest.raises(ValueError, match="class 'zebra', but only dog, cat can be told"):
        reward(Knowing())(RED[None, None], (unknown,))
    with pytest.raises(ValueError, match="colour 'mauve', but only red, blue"):
        reward(Knowing())(RED[None, None], (prompt({**DOG, "color": "mauve"}),))


def test_images_of_another_kind() -> None:
    refuses_bad_images(reward(), IMAGES, PROMPTS)


def test_one_prompt_for_each_group() -> None:
    with pytest.raises(ValueError, match="got 1 for 2 groups"):
        reward()(IMAGES, PROMPTS[:1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partial": "clipped"}, "bounded, released, got 'clipped'"),
        ({"weights": {}}, "at least one of"),
        ({"weights": {"partial": 1.0, "aesthetic": 1.0}}, "got .*aesthetic"),
        ({"weights": {"partial": float("nan")}}, "finite"),
        ({"detector": object()}, r"detect\(images\), got object"),
        ({"color_classifier": object()}, "no colors"),
        ({"threshold": 2.0}, "threshold"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reward(**changes)


def test_a_detector_without_colors_needs_a_classifier() -> None:
    class OnlyFinds:
        def detect(self, images: np.ndarray) -> list[Detections]:
            return [{} for _ in images]

    with pytest.raises(ValueError, match="something must name colours"):
        reward(OnlyFinds())
    assert reward(OnlyFinds(), PixelDetector())(IMAGES, PROMPTS).parts.sum() == 0


def test_the_recipe_states_every_argument(root: Path) -> None:
    recipe: Any = OmegaConf.to_container(OmegaConf.load(root / "conf" / "reward" / "shapes.yaml"))
    assert recipe.pop("_target_") == "stage.rewards.geneval.GenEvalReward"
    assert set(recipe) == set(inspect.signature(GenEvalReward).parameters)
    detector = recipe.pop("detector")
    assert detector.pop("_target_") == "stage.shapes.detector.ShapeDetector"
    assert set(detector) == set(inspect.signature(ShapeDetector).parameters)
    scores = GenEvalReward(PixelDetector(), **recipe)(IMAGES, PROMPTS)
    assert scores.names == ("partial", "strict") and scores.weights == (1.0, 0.0)


class Batching(PixelDetector):
    """A classifier that is asked about all pictures at once, and counts how often."""

    def __init__(self, lost: int = 0) -> None:
        super().__init__()
        self.sights: list[list[tuple[str, int]]] = []
        self.lost = lost

    def colors(self, image: np.ndarray, class_name: str, objects: Sequence[Detection]) -> list[str]:
        raise AssertionError("asked about one picture alone")

    def colors_in_batches(
        self, sights: Sequence[tuple[np.ndarray, str, Sequence[Detection]]]
    ) -> list[list[str]]:
        self.sights.append([(name, len(objects)) for _, name, objects in sights])
        answers = [super(Batching, self).colors(*sight) for sight in sights]
        return answers[self.lost :]


def test_colors_of_all_pictures_are_asked_for_together() -> None:
    """One question a rollout, about the pictures with a dog where a red dog is asked for; the scores are the same."""
    classifier = Batching()
    scores, expected = (reward(None, one)(IMAGES, PROMPTS) for one in (classifier, None))
    assert classifier.sights == [[("dog", 1)] * 3]
    assert torch.equal(scores.parts, expected.parts) and scores.reasons == expected.reasons


def test_several_objects_and_classes_of_one_picture() -> None:
    """Two red dogs and one blue cat: each class with as many objects as count; a prompt without colour asks nothing."""
    classifier = Batching()
    asked = prompt({**DOG, "count": 2, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"})
    full = picture((0, 0, 1, 10), (3, 0, 1, 10), (6, 0, 2, 20))
    scores = reward(None, classifier)(torch.stack([full, RED])[None], (asked,))
    assert classifier.sights == [[("cat", 1), ("dog", 2)]]
    assert scores.parts[0, :, 1].tolist() == [1, 0]


def test_a_classifier_that_loses_an_answer_stops_the_run() -> None:
    with pytest.raises(ValueError, match="Batching gave 2 answers for 3; repair how it batches"):
        reward(None, Batching(lost=1))(IMAGES, PROMPTS)


def test_the_published_recipe_with_tiny_networks(root: Path, tmp_path: Path) -> None:
    """conf/reward/geneval.yaml with GenEval's numbers, on a random Mask2Former and a random CLIP."""
    pytest.importorskip("cv2", reason="the extra `geneval` is not installed: no OpenCV")
    pytest.importorskip("open_clip", reason="the extra `geneval` is not installed: no open_clip")
    from tests.detectors.tiny_clip import make_clip
    from tests.detectors.tiny_mask2former import save_checkpoint

    name, clip = make_clip(tmp_path)
    config = OmegaConf.load(root / "conf" / "reward" / "geneval.yaml")
    assert config.detector.min_score == config.threshold == 0.3
    changes = {
        "detector": {"weights": str(save_checkpoint(tmp_path)), "scale": [96, 64]},
        "color_classifier": {"weights": str(clip), "model": name},
        "threshold": 0.0,
        "counting_threshold": 0.0,
    }
    scorer = instantiate(OmegaConf.merge(config, changes))
    images = torch.randint(0, 256, (2, 2, 32, 48, 3), dtype=torch.uint8)
    found = scorer.detector.detect(images.flatten(0, 1).numpy())
    common = max(found[0], key=lambda name: min(len(objects.get(name, ())) for objects in found))
    asked = prompt({"class": common, "count": 1, "color": "red"})
    scores = scorer(images, (asked, asked))
    assert scores.parts.shape == (2, 2, 2) and (scores.parts >= 0).all() and (scores.parts <= 1).all()
    assert all(common in reason for group in scores.reasons for reason in group if reason != "as asked")
    with pytest.raises(ValueError, match="asks for the class 'unicorn', but only person, bicycle"):
        scorer(images, (prompt({"class": "unicorn", "count": 1}), asked))
    with pytest.raises(ValueError, match="asks for the colour 'teal'"):
        scorer(images, (prompt({"class": "dog", "count": 1, "color": "teal"}), asked))


def test_without_weights_the_recipe_says_what_to_download(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra `geneval` is not installed: no OpenCV")
    pytest.importorskip("open_clip", reason="the extra `geneval` is not installed: no open_clip")
    config = OmegaConf.load(root / "conf" / "reward" / "geneval.yaml")
    config.detector.weights = str(tmp_path)
    with pytest.raises(InstantiationException, match=r"before the first rollout.*Run `mim download mmdet"):
        instantiate(config)


def test_prompts_are_checked_before_anything_is_drawn() -> None:
    scorer = reward(Knowing())
    assert isinstance(scorer, ChecksPrompts)
    scorer.check([RED_DOG])
    with pytest.raises(
        ValueError, match=r"'a plain prompt' cannot be scored: .*comes without GenEval's metadata"
    ):
        scorer.check([RED_DOG, Prompt(1, "a plain prompt", {"prompt": "a plain prompt", "nouns": ["dog"]})])
    with pytest.raises(ValueError, match="'zebra', but only dog, cat can be told"):
        scorer.check([prompt({"class": "zebra", "count": 1})])


def test_the_range_of_each_part() -> None:
    assert reward()(IMAGES, PROMPTS).ranges == ((0.0, 1.0), (0.0, 1.0))
    released = reward(partial="released", weights={"strict": 1.0, "partial": 1.0})(IMAGES, PROMPTS)
    assert released.ranges == ((0.0, 1.0), (-math.inf, 1.0))  # too many objects cost without limit
