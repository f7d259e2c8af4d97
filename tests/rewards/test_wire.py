"""Bodies of the reward service: lossless images, exact shapes, strict keys."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stage.rewards.wire import (
    ScoreAnswer,
    ScoreRequest,
    decode_image,
    decode_images,
    encode_image,
    from_answer,
    from_prompts,
    to_answer,
    to_prompts,
)
from stage.types import Prompt, Scores


def picture(side: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 1, 3), dtype=np.uint8)


def in_format(image: np.ndarray, kind: str, mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(
        file, format=kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    return base64.b64encode(file.getvalue()).decode()


def test_an_image_survives_the_wire_bit_for_bit() -> None:
    image = picture()
    assert np.array_equal(decode_image(encode_image(image)), image)
    assert np.array_equal(decode_image(in_format(image, "WEBP")), image)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("?", "base64"),
        ("", "PNG or WebP"),
        (base64.b64encode(b"not a picture").decode(), "PNG or WebP"),
        (in_format(picture(), "JPEG"), "PNG or WebP"),
        (encode_image(picture(40))[:-400], "whole PNG"),
        (in_format(picture(), "PNG", "L"), "mode L"),
        (in_format(picture(), "PNG", "RGBA"), "mode RGBA"),
        (in_format(np.zeros((1, 4097, 3), np.uint8), "PNG"), "4097 x 1"),
    ],
    ids=["alphabet", "empty", "no picture", "jpeg", "truncated", "grey", "alpha", "large"],
)
def test_what_is_no_picture_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_image(text)


def test_images_keep_their_places() -> None:
    rows = [[encode_image(picture(seed=10 * p + g)) for g in range(3)] for p in range(2)]
    images = decode_images(rows, 2)
    assert images.shape == (2, 3, 5, 6, 3)
    for p in range(2):
        for g in range(3):
            assert np.array_equal(images[p, g].numpy(), picture(seed=10 * p + g))


@pytest.mark.parametrize(
    "rows",
    [
        [[encode_image(picture())]],
        [[encode_image(picture())], [encode_image(picture())] * 2],
        [[encode_image(picture())], [encode_image(picture(6))]],
    ],
    ids=["one row for two prompts", "groups of two lengths", "two sizes"],
)
def test_images_of_other_shapes_are_refused(rows: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="images"):
        decode_images(rows, 2)


def test_prompts_survive_with_their_metadata() -> None:
    prompts = (Prompt(2**64 - 1, "a ö", {"include": [{"class": "cat", "count": 2}], "none": None}),)
    assert to_prompts(from_prompts(prompts)) == prompts


SCORES = Scores(
    torch.tensor([[[0.25, 3.0], [1.0, 4.0]]]), ("a", "b"), (1.0, 0.0), (("x", "y"),), ((0.0, 1.0), (0.0, 9.0))
)


def answer(**changes: Any) -> ScoreAnswer:
    return ScoreAnswer(**{**to_answer(SCORES, "s").model_dump(), **changes})


def test_scores_survive() -> None:
    found = from_answer(ScoreAnswer.model_validate_json(to_answer(SCORES, "s").model_dump_json()), 1, 2)
    assert torch.equal(found.parts, SCORES.parts)
    assert (found.names, found.weights, found.reasons, found.ranges) == (
        SCORES.names,
        SCORES.weights,
        SCORES.reasons,
        SCORES.ranges,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": [[[0.25, 3.0]]]},
        {"parts": [[[0.25], [1.0]]]},
        {"parts": [[[0.25, 3.0], [1.0, 4.0]]] * 2},
        {"reasons": [["x"]]},
        {"reasons": []},
        {"weights": [1.0]},
        {"ranges": [(0.0, 1.0)]},
        {"parts": [[[1.01, 3.0], [1.0, 4.0]]]},
        {"parts": [[[0.25, -0.1], [1.0, 4.0]]]},
    ],
)
def test_an_answer_that_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        from_answer(answer(**changes), 1, 2)


def test_an_answer_of_another_number_of_images_is_refused() -> None:
    with pytest.raises(ValueError, match="3 x 2 images"):
        from_answer(answer(), 3, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_part_that_is_not_finite_never_travels(value: float) -> None:
    broken = Scores(torch.tensor([[[value, 0.0]]]), ("a", "b"), (1.0, 0.0), (("x",),))
    with pytest.raises(ValidationError):
        to_answer(broken, "s")


def test_unknown_keys_and_versions_are_refused() -> None:
    good = {"version": 1, "prompts": [{"id": 0, "text": "a"}], "images": [["x"]]}
    ScoreRequest.model_validate(good)
    changes: list[dict[str, Any]] = [
        {"version": 2},
        {"imagess": []},
        {"prompts": []},
        {"images": []},
        {"images": [[]]},
    ]
    for change in changes:
        with pytest.raises(ValidationError):
            ScoreRequest.model_validate(good | change)
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(good | {"prompts": [{"id": -1, "text": "a"}]})


def test_a_range_without_an_end_survives_and_is_held() -> None:
    ranges = ((-math.inf, 1.0), (-math.inf, math.inf))
    sent = to_answer(replace(SCORES, ranges=ranges), "s").model_dump_json()
    assert from_answer(ScoreAnswer.model_validate_json(sent), 1, 2).ranges == ranges
    with pytest.raises(ValueError, match="must lie in"):
        from_answer(answer(ranges=[(None, 0.5), (None, None)]), 1, 2)


@pytest.mark.parametrize(
    "changes", [{"gates": torch.ones(1, 2, 2, dtype=torch.bool)}, {"schedules": ((), (lambda update: 1.0,))}]
)
def test_terms_of_a_run_are_not_served(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gates and schedules belong to a run"):
        to_answer(replace(SCORES, **changes), "s")


def test_a_request_that_unpacks_to_too_much_is_refused() -> None:
    """White pictures of 4,096 pixels are small files: 17 of them are more than 2**28 pixels."""
    text = encode_image(np.full((4096, 4096, 3), 255, dtype=np.uint8))
    assert len(text) < 1_000_000
    with pytest.raises(ValueError, match="17 of 4096 x 4096"):
        decode_images([[text] * 17], 1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_whatever_bytes_come_in_place_of_others_is_a_picture_or_an_error(kind: str) -> None:
    raw, random = base64.b64decode(in_format(picture(24), kind)), np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        broken = np.frombuffer(raw, dtype=np.uint8).copy()
        broken[random.integers(0, 60, 2)] = random.integers(0, 256, 2)
        try:
            decode_image(base64.b64encode(broken[: random.integers(1, 2 * len(raw))].tobytes()).decode())
        except ValueError:
            refused += 1
    assert refused > 200
