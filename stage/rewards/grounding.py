"""What boxes of a grounding detector are worth for a prompt: objects, relation or counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert, nms

from stage.rewards.mentions import Mentions, Relation

NEAR = ("next to", "on side of", "near")
# Axis (0 is x, 1 is y) and sign of the step from the first object to the second.
DIRECTIONS = {
    "on the right of": (0, -1),
    "right of": (0, -1),
    "on the left of": (0, 1),
    "left of": (0, 1),
    "on the bottom of": (1, -1),
    "below": (1, -1),
    "on the top of": (1, 1),
    "top of": (1, 1),
    "on top of": (1, 1),
    "above": (1, 1),
}
# What the published code forgets: an object on top of or above another earns nothing for its place.
FORGOTTEN = ("on top of", "above")


@dataclass(frozen=True)
class Boxes:
    """The boxes of one noun in one image: `places` `[n, 4]` as centre, width, height in [0, 1], `scores` `[n]`."""

    places: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Rules:
    """The score of an image, in [0, 1], from the boxes of each noun.

    - objects (any task but the next two): the share of nouns with a box.
    - spatial: 0.2 for each of the two objects, and half the position score of their most confident boxes; at
      most 0.9.
    - numeracy: the mean over the counted nouns of 1 for the right number of boxes after non-maximum
      suppression, 0.2 for another number and 0 for none.

    The position score is 1 if the centres lie in the direction named, further along its axis than across, and
    the boxes overlap less than `overlap`; with more overlap it is `overlap / IoU`. For nearness it is 1 if the
    centres are closer than `near` in x or y, else `near` over the larger distance.

    Source: CaraJ7/T2I-R1 src/t2i-r1/src/utils/reward_gdino.py, which the release of STAGE imports; its positions
    are those of Karine-Huang/T2I-CompBench UniDet_eval/2D_spatial_eval.py.

    Departures, unless `released`:
        1. "above" and "on top of" are directions; there they are in no branch and the position scores 0.
        2. Suppression sees corners; there it takes centre and size for corners.
        3. `near` is a share of the image's sides; there it is 150, a number of pixels, over boxes in [0, 1], so
           that any two objects are near.
        4. A noun of three or more words can be found; there the phrase of its box, first and last word, is not
           the noun.

    Args:
        released: keep those four as they were published.
        overlap: IoU up to which two boxes are beside each other.
        near: distance of the centres, as a share of the image's sides.
        suppression: IoU above which the less confident of two boxes of one noun is dropped before counting.
    """

    released: bool
    overlap: float
    near: float
    suppression: float

    def check(self, mentions: Mentions) -> None:
        """Raises ValueError for a relation that cannot be scored."""
        relation = mentions.relation
        if mentions.task != "spatial" or relation is None:
            return
        if relation.locality not in (*NEAR, *DIRECTIONS):
            raise ValueError(
                f"a locality is one of {', '.join((*NEAR, *DIRECTIONS))}, got {relation.locality!r}; use one"
            )
        if relation.first == relation.second:
            raise ValueError(
                f"a relation is between two nouns, got {relation.first!r} twice; name them apart"
            )

    def score(self, mentions: Mentions, found: Mapping[str, Boxes]) -> float:
        """The score of one image with at least one noun; `found` has an entry for each."""
        if mentions.task == "spatial" and mentions.relation is not None:
            return self._spatial(mentions.relation, found)
        if mentions.task == "numeracy":
            counts = mentions.counts
            return sum(self._counted(found[noun], number) for noun, number in counts) / len(counts)
        return sum(len(found[noun]) > 0 for noun in mentions.nouns) / len(mentions.nouns)

    def _spatial(self, relation: Relation, found: Mapping[str, Boxes]) -> float:
        first, second = found[relation.first], found[relation.second]
        score = 0.2 * (len(first) > 0) + 0.2 * (len(second) > 0)
        if not len(first) or not len(second):
            return score
        best = (boxes.places[boxes.scores.argmax()].double() for boxes in (first, second))
        return score + self.position(relation.locality, *best) / 2

    def position(self, locality: str, first: Tensor, second: Tensor) -> float:
        """The position score of two boxes `[4]` (centre, width, height), in [0, 1]."""
        step = (second[:2] - first[:2]).tolist()
        if locality in NEAR:
            far = max(abs(step[0]), abs(step[1]))
            close = min(abs(step[0]), abs(step[1])) < self.near
            return 1.0 if self.released or close else self.near / far
        if self.released and locality in FORGOTTEN:
            return 0.0
        axis, sign = DIRECTIONS[locality]
        if step[axis] * sign <= 0 or abs(step[axis]) <= abs(step[1 - axis]):
            return 0.0
        shared = _iou(first, second)
        return 1.0 if shared < self.overlap else self.overlap / shared

    def _counted(self, boxes: Boxes, number: int) -> float:
        if not len(boxes):
            return 0.0
        places = boxes.places.float()
        corners = places if self.released else box_convert(places, "cxcywh", "xyxy")
        kept = nms(corners, boxes.scores.float(), self.suppression)
        return 1.0 if len(kept) == number else 0.2


def _iou(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two boxes `[4]` as centre, width, height."""
    one, other = (box_convert(box, "cxcywh", "xyxy") for box in (first, second))
    sides = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0)
    shared = sides.prod().item()
    union = (first[2:].prod() + second[2:].prod()).item() - shared
    return shared / union if union > 0 else 0.0


def caption(nouns: Sequence[str]) -> tuple[str, list[list[tuple[int, int]]]]:
    """The text that a grounding detector reads, and the spans of characters of each noun: one a word."""
    spans: list[list[tuple[int, int]]] = []
    start = 0
    for noun in nouns:
        words = []
        for word in noun.split(" "):
            words.append((start, start + len(word)))
            start += len(word) + 1
        spans.append(words)
        start += 2  # the full stop and the space after it
    return " . ".join(nouns) + ".", spans
