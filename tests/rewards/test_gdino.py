"""GroundingDINO as a reward, beside transformers' own model on one image and one unpadded caption at a time."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stage.rewards.gdino import GDinoReward
from stage.types import Prompt, Scorer
from tests.rewards.hard_times import refuses_bad_images, survives_a_small_card
from tests.rewards.tiny_models import save_gdino
from tests.rewards.tiny_towers import pictures

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SETTINGS: dict[str, Any] = {
    "revision": None,
    "threshold": 0.3,
    "released": False,
    "overlap": 0.1,
    "near": 0.3,
    "suppression": 0.5,
    "device": "cpu",
    "dtype": "float32",
    "batch_size": 3,
}
OBJECTS = Prompt(
    1, "a roll of tape, a cat and a dog", {"task_type": "object", "nouns": ["roll of tape", "cat", "dog"]}
)
SPATIAL = Prompt(
    2,
    "a car left of a zebra",
    {
        "task_type": "spatial",
        "nouns": ["car", "zebra"],
        "spatial_info": {"obj1": "car", "obj2": "zebra", "locality": "left of"},
    },
)
COUNTS = Prompt(
    3,
    "two cats",
    {"task_type": "numeracy", "nouns": ["cat"], "numeracy_info": [{"obj_name": "cat", "num": 2}]},
)
NOTHING = Prompt(4, "rain", {"task_type": "non", "nouns": []})
PROMPTS = (OBJECTS, SPATIAL, COUNTS, NOTHING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gdino")
    save_gdino(folder)
    return folder


@cache
def published(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as transformers reads them."""
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection

    return GroundingDinoForObjectDetection.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(
        folder
    )


def boxes_by_hand(
    folder: Path, image: torch.Tensor, nouns: list[str], threshold: float
) -> dict[str, list[Any]]:
    """Noun to (probability, corners) of its boxes: a loop over the queries of one forward pass."""
    model, tokenizer = published(folder)
    pixels = ((image / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    encoding = tokenizer(" . ".join(nouns) + ".", return_tensors="pt")
    with torch.no_grad():
        output = model(pixels[None], encoding.input_ids, attention_mask=encoding.attention_mask)
    found: dict[str, list[Any]] = {noun: [] for noun in nouns}
    start = 1  # [CLS] comes first
    for noun in nouns:
        length = len(tokenizer(noun, add_special_tokens=False).input_ids)
        for query in range(output.logits.shape[1]):
            logits = output.logits[0, query, start : start + length].tolist()
            probability = sum(1 / (1 + math.exp(-logit)) for logit in logits) / length
            if probability > threshold:
                x, y, w, h = output.pred_boxes[0, query].tolist()
                found[noun].append((probability, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
        start += length + 1  # and a full stop after each noun
    return found


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def score_by_hand(prompt: Prompt, found: dict[str, list[Any]]) -> float:
    if prompt is OBJECTS:
        return sum(bool(boxes) for boxes in found.values()) / 3
    if prompt is COUNTS:
        kept: list[Any] = []
        for _, box in sorted(found["cat"], reverse=True):
            if all(overlap(box, other) <= 0.5 for other in kept):
                kept.append(box)
        return {0: 0.0, 2: 1.0}.get(len(kept), 0.2)
    score = 0.2 * bool(found["car"]) + 0.2 * bool(found["zebra"])
    if score < 0.4:
        return score
    car, zebra = (max(found[noun])[1] for noun in ("car", "zebra"))
    right, down = (zebra[i] + zebra[i + 2] - car[i] - car[i + 2] for i in (0, 1))
    if right <= 0 or right <= abs(down):
        return score
    return score + 0.5 * min(1.0, 0.1 / max(overlap(car, zebra), 1e-9))


def median_threshold(folder: Path, images: torch.Tensor) -> float:
    """A threshold that about half of the random probabilities pass."""
    found = [
        p for image in images.flatten(0, 1) for p, _ in boxes_by_hand(folder, image, ["cat"], -1.0)["cat"]
    ]
    return float(torch.tensor(found).median())


def test_scores_are_those_of_the_raw_outputs(folder: Path) -> None:
    images = pictures(4, 3, 128, 128)
    threshold = median_threshold(folder, images)
    scorer = GDinoReward(path=str(folder), **{**SETTINGS, "threshold": threshold})
    assert isinstance(scorer, Scorer)
    scores = scorer(images, PROMPTS)
    for p, prompt in enumerate(PROMPTS[:3]):
        for g in range(3):
            found = boxes_by_hand(folder, images[p, g], prompt.metadata["nouns"], threshold)
            assert scores.parts[p, g].item() == pytest.approx(score_by_hand(prompt, found), abs=1e-4)
            counts = ", ".join(f"{noun} {len(boxes)}" for noun, boxes in found.items())
            assert scores.reasons[p][g] == f"boxes: {counts}"
    assert scores.parts[3].flatten().tolist() == [1.0, 1.0, 1.0] and scores.reasons[3][0] == "no nouns"
    assert len(scores.parts[:3].unique()) > 2


def test_probabilities_and_boxes_agree(folder: Path) -> None:
    """Padded captions in a batch, beside single ones."""
    images = pictures(4, 1, 128, 128)
    scorer = GDinoReward(path=str(folder), **{**SETTINGS, "threshold": 0.0})
    asked = [scorer._mentions(prompt) for prompt in PROMPTS]
    found = scorer._detect(images[:, 0], asked)
    for p, prompt in enumerate(PROMPTS[:3]):
        expected = boxes_by_hand(folder, images[p, 0], prompt.metadata["nouns"], 0.0)
        for noun, boxes in expected.items():
            ours = found[p][noun]
            torch.testing.assert_close(
                ours.scores.double(), torch.tensor([s for s, _ in boxes]).double(), atol=1e-5, rtol=0
            )
            corners = torch.tensor([box for _, box in boxes])
            torch.testing.assert_close(
                (corners[:, :2] + corners[:, 2:]) / 2, ours.places[:, :2], atol=1e-5, rtol=0
            )


def test_batch_size_does_not_matter(folder: Path) -> None:
    images = pictures(3, 3, 100, 140)
    threshold = median_threshold(folder, images)
    rows = []
    for size in (1, 4, 9):
        scorer = GDinoReward(path=str(folder), **{**SETTINGS, "batch_size": size, "threshold": threshold})
        asked = [scorer._mentions(prompt) for prompt in PROMPTS[:3] for _ in range(3)]
        run = lambda batch, scorer=scorer, asked=asked: scorer._forward(images.flatten(0, 1), asked, batch, 3)  # noqa: E731
        rows.append(scorer.batches.run(run, list(range(9))))
    torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(rows[0], rows[2], atol=1e-5, rtol=0)


def test_released_cannot_find_three_words(folder: Path) -> None:
    images = pictures(1, 2, 128, 128)
    scores = [
        GDinoReward(path=str(folder), **{**SETTINGS, "threshold": 0.0, "released": released})(
            images, (OBJECTS,)
        )
        for released in (False, True)
    ]
    assert scores[0].parts.flatten().tolist() == [1.0, 1.0]
    assert scores[1].parts.flatten().tolist() == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_moves_the_surest_box_little(folder: Path, dtype: str) -> None:
    """The bound of the docstring; scores stay numbers in their range."""
    images = pictures(4, 4, 128, 128)
    full, half = (GDinoReward(path=str(folder), **{**SETTINGS, "dtype": name}) for name in ("float32", dtype))
    moved = full._surest(images[:3], PROMPTS[:3]) - half._surest(images[:3], PROMPTS[:3])
    assert 0 < moved.abs().max() < 0.1
    parts = half(images, PROMPTS).parts
    assert torch.isfinite(parts).all() and parts.min() >= 0 and parts.max() <= 1


def test_what_cannot_be_scored(folder: Path, tmp_path: Path) -> None:
    scorer, images = GDinoReward(path=str(folder), **SETTINGS), pictures(1, 1, 64, 64)
    info = {"obj1": "car", "obj2": "zebra", "locality": "behind"}
    for metadata, words in (
        ({"nouns": ["cat"] * 20}, "fit into 32 tokens"),
        ({**SPATIAL.metadata, "spatial_info": info}, "got 'behind'"),
        ({}, "must list the nouns"),
    ):
        with pytest.raises(ValueError, match=f"'a prompt' .number 5.*{words}"):
            scorer(images, (Prompt(5, "a prompt", metadata),))
        with pytest.raises(ValueError, match=words):
            scorer.check((*PROMPTS, Prompt(5, "a prompt", metadata)))
    with pytest.raises(ValueError, match="threshold is a probability"):
        GDinoReward(path=str(folder), **{**SETTINGS, "threshold": 30})
    with pytest.raises(FileNotFoundError, match="hf download IDEA-Research/grounding-dino-tiny"):
        GDinoReward(path=str(tmp_path / "none"), **SETTINGS)


def test_a_small_card_and_bad_images(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    scorer = GDinoReward(path=str(folder), **{**SETTINGS, "batch_size": 9})
    images = pictures(3, 3, 100, 140)
    refuses_bad_images(scorer, images, PROMPTS[:3])
    survives_a_small_card(lambda: (scorer, scorer.batches), images, PROMPTS[:3], monkeypatch, caplog)
