"""What boxes are worth: cases worked out by hand, with the slips of the published code and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage.rewards.grounding import Boxes, Rules, caption
from stage.rewards.mentions import Mentions, Relation, read_mentions
from stage.types import Prompt

RULES = Rules(released=False, overlap=0.1, near=0.3, suppression=0.5)
RELEASED = Rules(released=True, overlap=0.1, near=0.3, suppression=0.5)
NONE = Boxes(torch.zeros(0, 4), torch.zeros(0))


def boxes(*places: tuple[float, ...], scores: tuple[float, ...] = ()) -> Boxes:
    return Boxes(torch.tensor(places), torch.tensor(scores or [0.5] * len(places)))


def spatial(locality: str) -> Mentions:
    return Mentions("spatial", ("car", "dog"), None, Relation("car", "dog", locality), ())


def test_objects_are_counted_by_noun() -> None:
    mentions = Mentions("object", ("car", "dog", "cat", "dog"), None, None, ())
    found = {"car": boxes((0.5, 0.5, 0.1, 0.1)), "dog": boxes((0.5, 0.5, 0.1, 0.1)), "cat": NONE}
    assert RULES.score(mentions, found) == pytest.approx(3 / 4)


LEFT, RIGHT, TOP = (0.2, 0.5, 0.2, 0.2), (0.8, 0.5, 0.2, 0.2), (0.5, 0.1, 0.2, 0.2)
# Centres 0.1 apart in x, sides 0.2: they share 0.1 * 0.2 = 0.02 of 0.06, IoU 1/3.
CLOSE = (0.3, 0.5, 0.2, 0.2)


@pytest.mark.parametrize(
    ("locality", "first", "second", "position", "released"),
    [
        ("left of", LEFT, RIGHT, 1.0, None),
        ("on the left of", RIGHT, LEFT, 0.0, None),
        ("right of", RIGHT, LEFT, 1.0, None),
        ("right of", LEFT, LEFT, 0.0, None),
        ("left of", LEFT, CLOSE, 0.3, None),  # 0.1 / (1/3)
        ("left of", (0.2, 0.1, 0.1, 0.1), (0.5, 0.5, 0.1, 0.1), 0.0, None),  # 0.3 across, 0.4 down
        ("on the top of", TOP, (0.5, 0.9, 0.2, 0.2), 1.0, None),
        ("below", (0.5, 0.9, 0.2, 0.2), TOP, 1.0, None),
        ("on the bottom of", TOP, (0.5, 0.9, 0.2, 0.2), 0.0, None),
        ("above", TOP, (0.5, 0.9, 0.2, 0.2), 1.0, 0.0),
        ("on top of", TOP, (0.5, 0.9, 0.2, 0.2), 1.0, 0.0),
        ("near", LEFT, CLOSE, 1.0, None),
        ("next to", LEFT, (0.8, 0.5, 0.1, 0.1), 1.0, None),  # 0.6 apart in x but level
        ("on side of", LEFT, (0.7, 0.9, 0.1, 0.1), 0.3 / 0.5, 1.0),  # 0.5 and 0.4 apart
    ],
)
def test_positions(locality: str, first: Any, second: Any, position: float, released: float | None) -> None:
    found = {"car": boxes(first), "dog": boxes(second)}
    assert RULES.score(spatial(locality), found) == pytest.approx(0.4 + position / 2, abs=1e-6)
    expected = position if released is None else released
    assert RELEASED.score(spatial(locality), found) == pytest.approx(0.4 + expected / 2, abs=1e-6)


def test_the_most_confident_boxes_decide() -> None:
    cars = boxes(RIGHT, LEFT, scores=(0.4, 0.6))
    assert RULES.score(spatial("left of"), {"car": cars, "dog": boxes(TOP, RIGHT, scores=(0.3, 0.7))}) == 0.9
    assert RULES.score(spatial("left of"), {"car": cars, "dog": NONE}) == 0.2
    assert RULES.score(spatial("left of"), {"car": NONE, "dog": NONE}) == 0.0


def test_counts() -> None:
    mentions = Mentions("numeracy", ("car", "dog", "cat"), None, None, (("car", 2), ("dog", 1), ("cat", 1)))
    # Two cars apart, two dogs on one another of IoU 0.19 * 0.2 / (0.21 * 0.2) = 0.905, no cat.
    cars, dogs = boxes(LEFT, RIGHT), boxes((0.2, 0.5, 0.2, 0.2), (0.21, 0.5, 0.2, 0.2), scores=(0.4, 0.5))
    assert RULES.score(mentions, {"car": cars, "dog": dogs, "cat": NONE}) == pytest.approx(2 / 3)
    # Now three dogs apart instead of one.
    dogs = boxes(LEFT, RIGHT, TOP)
    assert RULES.score(mentions, {"car": cars, "dog": dogs, "cat": NONE}) == pytest.approx((1 + 0.2) / 3)


def test_the_published_suppression_takes_centres_for_corners() -> None:
    """Two boxes of side 1 whose centres lie 0.4 apart: one or two objects?

    In truth they share 0.6 of 2 - 0.6 = 1.4, an IoU of 0.43 that keeps both. Read as corners, (0.1, 0.5, 1, 1) and
    (0.5, 0.5, 1, 1) are 0.9 x 0.5 = 0.45 and 0.5 x 0.5 = 0.25, the second inside the first: 0.56 drops one.
    """
    mentions = Mentions("numeracy", ("dog",), None, None, (("dog", 1),))
    dogs = {"dog": boxes((0.1, 0.5, 1.0, 1.0), (0.5, 0.5, 1.0, 1.0))}
    assert RULES.score(mentions, dogs) == 0.2
    assert RELEASED.score(mentions, dogs) == 1.0


def test_relations_that_cannot_be_scored() -> None:
    RULES.check(spatial("near"))
    with pytest.raises(ValueError, match=r"a locality is one of next to.*got 'behind'"):
        RULES.check(spatial("behind"))
    with pytest.raises(ValueError, match="'cat' twice"):
        RULES.check(Mentions("spatial", ("cat",), None, Relation("cat", "cat", "near"), ()))
    RULES.check(Mentions("complex", ("cat",), None, Relation("cat", "cat", "behind"), ()))


def test_caption_and_spans() -> None:
    text, spans = caption(("car", "teddy bear", "roll of tape"))
    assert text == "car . teddy bear . roll of tape."
    assert [[text[a:b] for a, b in words] for words in spans] == [
        ["car"],
        ["teddy", "bear"],
        ["roll", "of", "tape"],
    ]


FIELDS = {"task_type": "numeracy", "nouns": ["car"], "numeracy_info": [{"obj_name": "car", "num": "3"}]}


def test_mentions_of_the_mixed_list() -> None:
    found = read_mentions(Prompt(1, "three cars", FIELDS))
    assert found == Mentions("numeracy", ("car",), None, None, (("car", 3),))


def test_mentions_of_geneval() -> None:
    metadata = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    }
    found = read_mentions(Prompt(1, "a dog left of a cat", metadata))
    assert found == Mentions("spatial", ("cat", "dog"), None, Relation("dog", "cat", "left of"), ())
    metadata = {"tag": "counting", "include": [{"class": "cat", "count": 3}]}
    assert read_mentions(Prompt(1, "three cats", metadata)).counts == (("cat", 3),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nouns": None}, "must list the nouns"),
        ({"nouns": "car"}, "nouns is a list of strings"),
        ({"nouns": ["car", " "]}, "non-empty strings"),
        ({"nouns": ["dog"]}, "one of the nouns"),
        ({"numeracy_info": None}, "a numeracy prompt has numeracy_info"),
        ({"numeracy_info": "3 cars"}, "is a list of entries"),
        ({"numeracy_info": [{"obj_name": "car", "num": "many"}]}, "a num of at least 1"),
        ({"numeracy_info": [{"obj_name": "car", "num": 0}]}, "a num of at least 1"),
        ({"task_type": "spatial"}, "a spatial prompt has spatial_info"),
        ({"spatial_info": {"obj1": "car"}}, "obj1, obj2 and locality"),
    ],
)
def test_metadata_that_cannot_be_scored(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"three cars.*number 4.*{words}"):
        read_mentions(Prompt(4, "three cars", {**FIELDS, **changes}))


def test_every_line_of_the_mixed_list_can_be_scored(shared: Any) -> None:
    import json

    with (shared / "data" / "geneval_and_t2i_train.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            metadata = json.loads(line)
            mentions = read_mentions(Prompt(number, metadata["prompt"], metadata))
            RULES.check(mentions)
            assert mentions.nouns
