"""Named parts: what may be weighed, and how values become a grid."""

from __future__ import annotations

import math

import pytest
import torch

from stage.rewards.parts import Parts

KNOWN = ("ocr", "strict")


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({}, r"weights name at least one of ocr, strict, got \[\]"),
        ({"ocr": 1.0, "loose": 1.0}, r"at least one of ocr, strict, got \['ocr', 'loose'\]"),
        ({"ocr": math.nan}, "weights are finite numbers"),
        ({"strict": -math.inf}, "weights are finite numbers"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Parts(weights, KNOWN)


def test_values_stand_in_the_order_of_the_weights() -> None:
    parts = Parts({"strict": 0, "ocr": 2}, KNOWN)
    values = [{"ocr": n / 8, "strict": float(n % 2), "never": 9.0} for n in range(6)]
    limits = {"ocr": (0.0, 1.0), "strict": (-1.0, 2.0)}
    scores = parts.scores(torch.zeros(2, 3, 1, 1, 3), values, "abcdef", limits)
    assert scores.parts.tolist() == [
        [[0.0, 0.0], [1.0, 0.125], [0.0, 0.25]],
        [[1.0, 0.375], [0.0, 0.5], [1.0, 0.625]],
    ]
    assert scores.parts.dtype == torch.float32
    assert scores.names == ("strict", "ocr") and scores.weights == (0.0, 2.0)
    assert scores.ranges == ((-1.0, 2.0), (0.0, 1.0)) and scores.reasons == (("a", "b", "c"), ("d", "e", "f"))
