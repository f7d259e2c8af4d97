"""The ocr reward: its text, its arithmetic against a loop, real PP-OCR weights on small and large pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stage.score_checks import check_itself
from stage.types import ChecksItself, ChecksPrompts, Prompt, Scorer, TextReader

pytest.importorskip("rapidfuzz", reason="the extra `ocr` is not installed")

from stage.rewards.ocr import OcrReward, normalised, quoted, similarity, written

WEIGHTS = {"ocr": 1.0, "strict": 0.0}


class Told:
    """Reads what it is told; keeps the pictures it was given."""

    def __init__(self, answers: Sequence[tuple[str, ...]] = ()) -> None:
        self.answers: list[tuple[str, ...]] = list(answers)
        self.provenance: dict[str, Any] = {"engine": "told"}
        self.given: list[np.ndarray] = []

    def read(self, images: np.ndarray) -> list[tuple[str, ...]]:
        self.given.append(images)
        return [self.answers.pop(0) for _ in images]


def reward(*answers: tuple[str, ...]) -> OcrReward:
    return OcrReward(lambda: Told(answers), 0, WEIGHTS)


# --- The text that is asked for


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "CAT"', "CAT"),
        ('"New York" and "Paris"', "New York"),
        ("a sign that says “CAT” in red", "CAT"),
        ("ein Schild „Katze“ und “Hund”", "Katze"),
        ('“one” and "two"', "one"),
        ("a 'quoted' word and \"another\"", "another"),
        ('it says "don\'t stop"', "don't stop"),
        ('an open quote "STOP', "STOP"),  # split('"')[1] of the release
        ('a ruler of 12" and more', " and more"),
    ],
)
def test_the_first_quoted_string(prompt: str, text: str) -> None:
    assert quoted(prompt) == text
    if "“" not in prompt and "„" not in prompt:
        assert prompt.split('"')[1] == text  # the release


@pytest.mark.parametrize(
    "prompt", ["a cat", "", "a 'single' quote", 'nothing ""', 'spaces "  " only', "curved “”", 'tail"']
)
def test_a_prompt_without_quoted_text_is_refused_before_training(prompt: str) -> None:
    scorer = reward()
    assert isinstance(scorer, ChecksPrompts) and isinstance(scorer, Scorer)
    scorer.check([Prompt(1, 'a "fine" one')])
    with pytest.raises(ValueError, match=r"double quotes, .* quotes nothing; write the words like a sign"):
        scorer.check([Prompt(1, 'a "fine" one'), Prompt(2, prompt)])
    with pytest.raises(ValueError, match="quotes nothing"):
        scorer(torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8), [Prompt(2, prompt)])


# --- The arithmetic


def released(recognised: str, prompt: str) -> float:
    """The release written out, with an edit distance by the textbook's table."""
    read, target = recognised.replace(" ", "").lower(), prompt.split('"')[1].replace(" ", "").lower()
    table = [[i + j if not i or not j else 0 for j in range(len(target) + 1)] for i in range(len(read) + 1)]
    for i in range(1, len(read) + 1):
        for j in range(1, len(target) + 1):
            swap = table[i - 1][j - 1] + (read[i - 1] != target[j - 1])
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, swap)
    distance = 0 if target in read else table[-1][-1]
    return 1 - min(distance, len(target)) / len(target)


def test_by_hand() -> None:
    assert similarity("CAT", ["cat"]) == 1
    assert similarity("CAT", ["the c", "at sat"]) == 1  # joined and without spaces: "thecatsat"
    assert similarity("CAT", ["KAT"]) == pytest.approx(2 / 3)  # one of three letters
    assert similarity("CAT", ["CA"]) == pytest.approx(2 / 3)
    assert similarity("Hello World", ["helo wor1d"]) == pytest.approx(0.8)  # 2 edits of 10 letters
    assert similarity("CAT", []) == similarity("CAT", ["entirely else"]) == 0  # capped at three edits


def test_equals_the_release_on_random_words() -> None:
    rng = np.random.default_rng(0)
    letters, seen = list("aBc d"), set()
    for _ in range(400):
        target, read = ("".join(rng.choice(letters, rng.integers(1, 8))) for _ in range(2))
        if target.strip():
            value = similarity(target, [read[:2], read[2:]])
            assert value == pytest.approx(released(read, f'"{target}"'), abs=1e-12)
            assert 0 <= value <= 1
            seen.add(round(value, 3))
    assert {0.0, 1.0} < seen and len(seen) > 8
    assert normalised("A b\tC") == "ab\tc"  # spaces alone, as in the release


# --- The scorer


def test_scores_of_two_groups() -> None:
    scorer = reward(("CAT",), ("KAT",), ("dog",), ("a DOG", "here"))
    images = torch.randint(0, 255, (2, 2, 4, 5, 3), dtype=torch.uint8)
    scores = scorer(images, [Prompt(1, 'a "CAT"'), Prompt(2, 'a "DOG"')])
    assert scores.names == ("ocr", "strict") and scores.weights == (1.0, 0.0)
    assert scores.ranges == ((0.0, 1.0), (0.0, 1.0)) and scores.parts.dtype == torch.float32
    torch.testing.assert_close(
        scores.parts, torch.tensor([[[1, 1], [2 / 3, 0]], [[1, 1], [1, 1]]], dtype=torch.float32)
    )
    assert scores.reasons[0][1] == "read 'KAT', asked for 'CAT'"
    told = scorer.reader
    assert isinstance(told, Told) and np.array_equal(told.given[-1], images.flatten(0, 1).numpy())


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 2, 0, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 2, 4, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 2, 4, 4, 1, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 2, 4, 4, 3),
    ],
)
def test_pictures_that_are_none(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"uint8 RGB .* with at least one pixel"):
        reward(("CAT",), ("CAT",))(images, [Prompt(1, '"CAT"')])


def test_one_prompt_a_group() -> None:
    with pytest.raises(ValueError, match="one prompt for each group, got 2 for 1"):
        reward()(torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8), [Prompt(1, '"A"'), Prompt(2, '"B"')])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {}}, "at least one of ocr, strict"),
        ({"weights": {"text": 1.0}}, r"got \['text'\]"),
        ({"weights": {"ocr": float("nan")}}, "finite"),
        ({"processes": -1}, "got -1"),
        ({"processes": True}, "got True"),
    ],
)
def test_what_is_refused_when_it_is_built(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"reader": Told, "processes": 0, "weights": WEIGHTS}
    with pytest.raises(ValueError, match=words):
        OcrReward(**(arguments | changes))


def test_an_engine_that_reads_nothing_is_refused_before_training() -> None:
    good = reward(("STAGE",), ("CAT",))
    assert isinstance(good, ChecksItself)
    check_itself(good, True)
    blind = reward((), ())
    check_itself(blind, False)
    with pytest.raises(
        ValueError, match=r"black 'STAGE' on white in 384 pixels .* read \[\].*self_check=false"
    ):
        check_itself(blind, True)


# --- Real weights


def real(side: int = 256) -> TextReader:
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    from stage.detectors.rapid_ocr import RapidReader

    return RapidReader(side, box_threshold=0.5, unclip_ratio=1.6, text_score=0.5, threads=1)


def test_real_weights_read_small_and_large_signs() -> None:
    scorer = OcrReward(real, 0, WEIGHTS)
    scorer.self_check()  # reads 384 and 96 pixels
    assert set(scorer.provenance["sha256"]) == {"PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"}
    images = torch.from_numpy(np.stack([np.asarray(written(word, 64)) for word in ("DOG", "QX", "DIG", "")]))
    scores = scorer(images[None], [Prompt(1, 'a sign that says "DOG"')])
    assert scores.parts[0, :, 0].tolist() == pytest.approx([1, 0, 2 / 3, 0])


def test_colours_reach_the_engine_as_bgr() -> None:
    reader = real()
    given: list[np.ndarray] = []

    class Spy:
        txts = ("seen",)

        def __call__(self, image: np.ndarray) -> Spy:
            given.append(image)
            return self

    reader._engine = Spy()  # type: ignore[attr-defined]
    red = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    red[..., 0] = 200
    assert reader.read(red) == [("seen",)]
    assert given[0][0, 0].tolist() == [0, 0, 200] and given[0].flags.c_contiguous


def test_the_yaml_is_the_reward(root: Any) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        node = compose("train", ["reward=ocr", "reward.processes=0"]).reward
    pytest.importorskip("rapidocr", reason="the extra `ocr` is not installed")
    scorer = instantiate(node)
    assert scorer.names == ("ocr", "strict") and scorer.weights == (1.0, 0.0)
