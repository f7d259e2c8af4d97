"""GenEval's verdicts: by hand, against an independent reading of the rules, properties, golden cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage.geneval import Judge, Ruling, overlap, relations, suppress
from stage.request import RELATIONS, parse_request
from stage.types import Detection

Objects = dict[str, list[Detection]]
Colored = dict[str, list[tuple[Detection, str]]]

GENEVAL = Judge(threshold=0.3, counting_threshold=0.9, max_objects=16, nms_threshold=1.0, position_margin=0.1)


def at(x: float, y: float, score: float = 0.95, side: float = 20.0) -> Detection:
    """A square whose centre is (x, y)."""
    return Detection((x - side / 2, y - side / 2, x + side / 2, y + side / 2), score)


def many(count: int, score: float = 0.95) -> list[Detection]:
    return [at(40.0 * i, 0.0, score) for i in range(count)]


def metadata(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "prompt": "a photo", "include": list(include), "exclude": list(exclude)}


def thing(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def rule(judge: Judge, line: dict[str, Any], found: Colored | Objects) -> Ruling:
    """The ruling where each detection may come with its colour."""
    pairs = {
        name: [entry if isinstance(entry, tuple) else (entry, "grey") for entry in entries]
        for name, entries in found.items()
    }
    named = {(name, seen): color for name, entries in pairs.items() for seen, color in entries}
    return judge.rule(
        parse_request(line),
        {name: [seen for seen, _ in entries] for name, entries in pairs.items()},
        lambda name, objects: [named[name, seen] for seen in objects],
    )


def answers(ruling: Ruling) -> tuple[bool, bool, float, float]:
    return ruling.correct, ruling.strict_correct, ruling.bounded, ruling.released


CAT = at(100.0, 50.0)
DOG_LEFT = at(20.0, 50.0)
ONE_DOG = metadata("single_object", thing("dog"))
DOG_CAT = metadata("two_object", thing("dog"), thing("cat"))
THREE_DOGS = metadata("counting", thing("dog", 3), exclude=[thing("dog", 4)])
RED_DOG = metadata("colors", thing("dog", color="red"))
RED_DOG_BLUE_CAT = metadata("color_attr", thing("dog", color="red"), thing("cat", color="blue"))
DOG_LEFT_OF_CAT = metadata("position", thing("cat"), thing("dog", position=["left of", 0]))

# metadata, objects (with colours), correct, strict_correct, bounded, released. Comments give the terms.
CASES: dict[str, tuple[dict[str, Any], Any, bool, bool, float, float]] = {
    "one": (ONE_DOG, {"dog": many(1)}, True, True, 1.0, 1.0),
    "none": (ONE_DOG, {"cat": many(1)}, False, False, 0.0, 0.0),  # 1 - 1/1
    "one too many": (ONE_DOG, {"dog": many(2)}, True, False, 0.0, 0.0),  # 1 - 1/1
    "three too many": (ONE_DOG, {"dog": many(4)}, True, False, 0.0, -2.0),  # 1 - 3/1, bounded at 0
    "both": (DOG_CAT, {"dog": many(1), "cat": many(1)}, True, True, 1.0, 1.0),
    "one of two": (DOG_CAT, {"cat": many(1)}, False, False, 0.5, 0.5),  # (0 + 1) / 2
    "a crowd of one": (DOG_CAT, {"dog": many(1), "cat": many(4)}, True, False, 0.5, -0.5),  # (1 - 2) / 2
    "three": (THREE_DOGS, {"dog": many(3)}, True, True, 1.0, 1.0),
    "two of three": (THREE_DOGS, {"dog": many(2)}, False, False, 2 / 3, 1 - 1 / 3),
    "four of three": (THREE_DOGS, {"dog": many(4)}, False, False, 2 / 3, 1 - 1 / 3),  # the exclude is no term
    "seven of three": (THREE_DOGS, {"dog": many(7)}, False, False, 0.0, 1 - 4 / 3),
    "one unsure": (THREE_DOGS, {"dog": [*many(3), at(0, 90, 0.9)]}, True, True, 1.0, 1.0),  # not above 0.9
    "red": (RED_DOG, {"dog": [(at(0, 0), "red")]}, True, True, 1.0, 1.0),
    "blue instead": (RED_DOG, {"dog": [(at(0, 0), "blue")]}, False, False, 0.5, 0.5),  # (1 + 0) / 2
    "no dog to be red": (RED_DOG, {}, False, False, 0.0, 0.0),  # (0 + 0) / 2
    "the surer dog is blue": (  # one dog too many: (0 + 0) / 2 in both
        RED_DOG, {"dog": [(at(0, 0, 0.5), "red"), (at(50, 0, 0.8), "blue")]}, False, False, 0.0, 0.0,
    ),
    "the surer dog is red": (
        RED_DOG, {"dog": [(at(0, 0, 0.5), "blue"), (at(50, 0, 0.8), "red")]}, True, False, 0.0, 0.0,
    ),
    "both coloured": (
        RED_DOG_BLUE_CAT, {"dog": [(at(0, 0), "red")], "cat": [(CAT, "blue")]}, True, True, 1.0, 1.0,
    ),
    "colours swapped": (  # (1 + 0 + 1 + 0) / 4
        RED_DOG_BLUE_CAT, {"dog": [(at(0, 0), "blue")], "cat": [(CAT, "red")]}, False, False, 0.5, 0.5,
    ),
    "colour of one wrong, other absent": (  # (1 + 0 + 0 + 0) / 4
        RED_DOG_BLUE_CAT, {"dog": [(at(0, 0), "blue")]}, False, False, 0.25, 0.25,
    ),
    "left": (DOG_LEFT_OF_CAT, {"cat": [CAT], "dog": [DOG_LEFT]}, True, True, 1.0, 1.0),
    "right instead": (  # bounded (1 + 1 + 0) / 3, released (1 + 1 + 0 + 1) / 4
        DOG_LEFT_OF_CAT, {"cat": [CAT], "dog": [at(180, 50)]}, False, False, 2 / 3, 0.75,
    ),
    "no cat to be left of": (  # (0 + 1 + 0) / 3 in both
        DOG_LEFT_OF_CAT, {"dog": [DOG_LEFT]}, False, False, 1 / 3, 1 / 3,
    ),
    "no dog": (DOG_LEFT_OF_CAT, {"cat": [CAT]}, False, False, 1 / 3, 1 / 3),  # (1 + 0 + 0) / 3
    "left of the surest cat": (  # strictly one cat too many: (0 + 1 + 0) / 3
        DOG_LEFT_OF_CAT, {"cat": [at(0, 50, 0.4), CAT], "dog": [DOG_LEFT]}, True, False, 1 / 3, 1 / 3,
    ),
    "three dogs": (  # bounded (1 + 0 + 0) / 3, released (1 - 1 + 0) / 3
        DOG_LEFT_OF_CAT, {"cat": [CAT], "dog": [DOG_LEFT, *many(2)]}, True, False, 1 / 3, 0.0,
    ),
    "all of it, count wrong": (  # bounded (1 + 0 + 0 + 0) / 4; released in one term: (1 + 0 + 0) / 3
        metadata("mix", thing("cat"), thing("dog", color="red", position=["left of", 0])),
        {"cat": [CAT]}, False, False, 0.25, 1 / 3,
    ),
    "all of it, colour wrong": (  # bounded (1 + 1 + 0 + 0) / 4; released without a third: (1 + 1 + 0) / 3
        metadata("mix", thing("cat"), thing("dog", color="red", position=["left of", 0])),
        {"cat": [CAT], "dog": [(DOG_LEFT, "blue")]}, False, False, 0.5, 2 / 3,
    ),
    "two of three red": (  # (1 + 2/3) / 2
        metadata("mix", thing("dog", 3, color="red")),
        {"dog": list(zip(many(3), ["red", "blue", "red"], strict=True))},
        False, False, (1 + 2 / 3) / 2, (1 + (1 - 1 / 3)) / 2,
    ),
    "a cat that must not be": (  # excludes are a term of bounded alone: (1 + 0) / 2
        metadata("mix", thing("dog"), exclude=[thing("cat")]),
        {"dog": many(1), "cat": many(1)}, False, True, 0.5, 1.0,
    ),
    "a cat that is not": (  # (1 + 1) / 2
        metadata("mix", thing("dog"), exclude=[thing("cat")]), {"dog": many(1)}, True, True, 1.0, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case: str) -> None:
    line, found, correct, strict, bounded, released = CASES[case]
    ruling = rule(GENEVAL, line, found)
    assert answers(ruling)[:2] == (correct, strict)
    assert ruling.bounded == pytest.approx(bounded, abs=1e-12)
    assert ruling.released == pytest.approx(released, abs=1e-12)
    assert bool(ruling.reason) == (not correct)
    assert bool(ruling.strict_reason) == (not (strict and correct))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("none", ["at least 1 dog", "found 0"]),
        ("four of three", ["fewer than 4 dog", "found 4"]),
        ("blue instead", ["1 red dog", "found 0", "blue"]),
        ("right instead", ["dog left of cat", "right of"]),
        ("no cat to be left of", ["1 cat", "dog left of cat", "not there"]),
        ("a cat that must not be", ["fewer than 1 cat, found 1"]),
    ],
)
def test_reasons_say_what_is_wrong(case: str, words: list[str]) -> None:
    reason = rule(GENEVAL, *CASES[case][:2]).reason
    assert all(word in reason for word in words), reason


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # Centres (10, 10) and (60, 10), sides 20 + 20: |dx| 50 - 0.1 * 40 = 46, of a length of 50 is 0.92.
        (at(10, 10), at(60, 10), ("left of",)),
        (at(60, 10), at(10, 10), ("right of",)),
        (at(10, 10), at(10, 60), ("above",)),
        (at(10, 60), at(10, 10), ("below",)),
        # Both offsets 50 - 4 = 46, of a length of 70.71 is 0.65.
        (at(10, 10), at(60, 60), ("left of", "above")),
        (at(60, 10), at(10, 60), ("right of", "above")),
        # dx 50 -> 46, dy 30 -> 26, length 58.31: 0.79 and 0.45.
        (at(60, 40), at(10, 10), ("right of",)),
        # Sides 100 + 100 take 20 off an offset of 10: nothing is left.
        (at(10, 0, side=100), at(0, 0, side=100), ()),
        (at(0, 0), at(0, 0), ()),
        # (10, 6) with sides 30 + 30: (4, 0) of a length of 11.66 is 0.34.
        (at(10, 6, side=30), at(0, 0, side=30), ()),
    ],
)
def test_relations_by_hand(a: Detection, b: Detection, expected: tuple[str, ...]) -> None:
    assert relations(a.box, b.box, 0.1) == expected


def test_margin_is_a_share_of_the_sides() -> None:
    # dx 10, sides 20 + 20. Margin 0.1 leaves 6 of 10, margin 0.2 leaves 2 of 10.
    assert relations(at(10, 0).box, at(0, 0).box, 0.1) == ("right of",)
    assert relations(at(10, 0).box, at(0, 0).box, 0.2) == ()


def test_every_object_stands_in_the_relation_to_every_target() -> None:
    line = metadata("position", thing("cat", 2), thing("dog", 2, position=["left of", 0]))
    cats = [at(100, 50), at(150, 50)]
    assert rule(GENEVAL, line, {"cat": cats, "dog": [at(20, 50), at(50, 50)]}).correct
    assert not rule(GENEVAL, line, {"cat": cats, "dog": [at(20, 50), at(125, 50)]}).correct
    assert not rule(GENEVAL, line, {"cat": [at(100, 50), at(0, 50)], "dog": [at(40, 50), at(50, 50)]}).correct


def test_the_relation_is_to_the_include_it_names() -> None:
    found: Objects = {"cat": [at(0, 0)], "cup": [at(200, 0)], "dog": [at(100, 0)]}
    for target, relation in ((0, "right of"), (1, "left of")):
        line = metadata("position", thing("cat"), thing("cup"), thing("dog", position=[relation, target]))
        assert rule(GENEVAL, line, found).correct
        line["include"][2]["position"][1] = 1 - target
        assert not rule(GENEVAL, line, found).correct


def test_a_target_of_the_wrong_colour_is_no_target() -> None:
    line = metadata("mix", thing("cat", color="red"), thing("dog", position=["left of", 0]))
    ruling = rule(GENEVAL, line, {"cat": [(CAT, "blue")], "dog": [(DOG_LEFT, "blue")]})
    assert not ruling.correct and "not there as asked" in ruling.reason
    # Number and colour of the cat, number and relation of the dog.
    assert ruling.released == (1 + 0 + 1 + 0) / 4


def test_overlap_counts_inclusive_pixels() -> None:
    # Sides 0..9 are 10 pixels. Shared 5..9 x 0..9 = 50 of 100 + 100 - 50.
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1


def test_suppression_keeps_the_surest() -> None:
    first, second, third = (Detection((x, 0, x + 9, 9), 0.9) for x in (0, 5, 10))  # neighbours overlap by 1/3
    assert suppress([first, second, third], 1 / 3) == (
        first,
        third,
    )  # the second falls, so it covers no third
    assert suppress([first, second, third], 0.34) == (first, second, third)
    assert suppress([first, first], 1.0) == (first, first)


@pytest.mark.parametrize(
    ("tag", "score", "counts"),
    [("colors", 0.3, False), ("colors", 0.31, True), ("counting", 0.9, False), ("counting", 0.91, True)],
)
def test_thresholds_are_exceeded(tag: str, score: float, counts: bool) -> None:
    assert bool(GENEVAL.keep({"dog": [at(0, 0, score)]}, tag)) == counts


def test_only_the_surest_objects_are_kept_in_order() -> None:
    judge = Judge(0.3, 0.9, max_objects=2, nms_threshold=1.0, position_margin=0.1)
    kept = judge.keep({"dog": [at(0, 0, 0.5), at(1, 0, 0.7), at(2, 0, 0.6), at(3, 0, 0.2)], "cat": []}, "x")
    assert {name: [seen.score for seen in objects] for name, objects in kept.items()} == {"dog": [0.7, 0.6]}


@pytest.mark.parametrize("broken", [at(0, 0, math.nan), at(0, 0, math.inf), at(math.nan, 0)])
def test_a_broken_detection_is_an_error(broken: Detection) -> None:
    with pytest.raises(ValueError, match="finite"):
        rule(GENEVAL, ONE_DOG, {"dog": many(1), "cat": [broken]})


def test_colors_are_asked_once_and_only_where_they_decide() -> None:
    asked: list[tuple[str, int]] = []

    def colors(name: str, objects: Sequence[Detection]) -> list[str]:
        asked.append((name, len(objects)))
        return ["red"] * len(objects)

    request = parse_request(RED_DOG_BLUE_CAT)
    GENEVAL.rule(request, {"dog": many(1), "cup": many(3)}, colors)
    assert asked == [("dog", 1)]
    with pytest.raises(ValueError, match="got 0 for 1 'dog'"):
        GENEVAL.rule(request, {"dog": many(1)}, lambda name, objects: [])


@pytest.mark.parametrize(
    "numbers",
    [
        {"threshold": -0.1},
        {"threshold": math.nan},
        {"counting_threshold": 1.1},
        {"max_objects": 0},
        {"max_objects": True},
        {"nms_threshold": 0.0},
        {"nms_threshold": 1.5},
        {"position_margin": -0.1},
        {"position_margin": math.nan},
    ],
)
def test_numbers_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    good = {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16, "nms_threshold": 1.0}
    with pytest.raises(ValueError, match=next(iter(numbers))):
        Judge(**{**good, "position_margin": 0.1, **numbers})


# --- An independent reading of the rules, as plain loops over arrays, on random worlds.

CLASSES, COLORS = ("a", "b", "c"), ("red", "blue")


def random_line(rng: np.random.Generator) -> dict[str, Any]:
    include: list[dict[str, Any]] = []
    for index in range(int(rng.integers(1, 4))):
        entry = thing(str(rng.choice(CLASSES)), int(rng.integers(1, 4)))
        if rng.random() < 0.4:
            entry["color"] = str(rng.choice(COLORS))
        if index and rng.random() < 0.6:
            entry["position"] = [str(rng.choice(RELATIONS)), int(rng.integers(0, index))]
        include.append(entry)
    exclude = [thing(str(rng.choice(CLASSES)), int(rng.integers(4, 6)))] if rng.random() < 0.4 else []
    return metadata("any", *include, exclude=exclude)


def random_objects(rng: np.random.Generator) -> Colored:
    """Classes in corners of their own, half of the time, so that relations do hold now and then."""
    corner = {"a": (0.0, 0.0), "b": (80.0, 0.0), "c": (0.0, 80.0)}
    found: Colored = {}
    for name in CLASSES:
        spread, start = (8.0, corner[name]) if rng.random() < 0.5 else (100.0, (0.0, 0.0))
        found[name] = []
        for _ in range(int(rng.integers(0, 6))):
            x, y = rng.uniform(0, spread, 2) + start
            width, height = rng.uniform(5, 40, 2)
            seen = Detection((x, y, x + width, y + height), float(rng.uniform(0.2, 1)))
            found[name].append((seen, str(rng.choice(COLORS, p=(0.8, 0.2)))))
    return found


def stands(box: np.ndarray, other: np.ndarray, relation: str) -> bool:
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    middle, other_middle = (box[:2] + box[2:]) / 2, (other[:2] + other[2:]) / 2
    away = middle - other_middle
    free = np.abs(away) - 0.1 * (box[2:] - box[:2] + other[2:] - other[:2])
    return bool(free.max() > 1e-3 and free[axis] / np.linalg.norm(away) > 0.5 and away[axis] * sign > 0)


def reference(line: dict[str, Any], found: Colored) -> tuple[bool, bool, float]:
    """correct, strict_correct, released."""
    kept = {
        name: sorted((pair for pair in pairs if pair[0].score > 0.3), key=lambda pair: -pair[0].score)
        for name, pairs in found.items()
    }
    verdicts, terms = [], []
    for exact in (False, True):
        met: list[bool] = []
        for entry in line["include"]:
            count, all_seen = entry["count"], kept[entry["class"]]
            seen = all_seen[:count]
            enough = len(all_seen) == count if exact else len(all_seen) >= count
            right = sum(color == entry.get("color") for _, color in seen)
            colored = "color" not in entry or right == count
            placed, target_met = True, True
            if "position" in entry:
                relation, target = entry["position"]
                wanted = line["include"][target]
                target_met = met[target]
                others = kept[wanted["class"]][: wanted["count"]]
                placed = target_met and all(
                    stands(np.array(one.box), np.array(other.box), relation)
                    for one, _ in seen
                    for other, _ in others
                )
            met.append(enough and colored and placed)
            if exact:
                terms.append(1 - abs(count - len(all_seen)) / count)
                if not enough:
                    terms += [0.0] if "color" in entry or "position" in entry else []
                    continue
                terms += [right / count] if "color" in entry else []
                if "position" in entry and colored:
                    terms += [0.0] if not target_met else [1.0] if placed else [0.0, 1.0]
        verdicts.append(all(met))
    for entry in line["exclude"]:
        verdicts[0] = verdicts[0] and len(kept[entry["class"]]) < entry["count"]
    return verdicts[0], verdicts[1], math.fsum(terms) / len(terms)


@pytest.fixture(scope="module")
def worlds() -> list[tuple[dict[str, Any], Colored]]:
    rng = np.random.default_rng(7)
    return [(random_line(rng), random_objects(rng)) for _ in range(2000)]


def test_agrees_with_an_independent_reading(worlds: list[tuple[dict[str, Any], Colored]]) -> None:
    seen = set()
    for line, found in worlds:
        correct, strict, released = reference(line, found)
        ruling = rule(GENEVAL, line, found)
        assert (ruling.correct, ruling.strict_correct) == (correct, strict), (line, found)
        assert ruling.released == pytest.approx(released, abs=1e-12), (line, found)
        seen.add((correct, strict))
    assert {(True, True), (True, False), (False, False)} <= seen


def test_order_of_detections_changes_nothing(worlds: list[tuple[dict[str, Any], Colored]]) -> None:
    rng = np.random.default_rng(8)
    for line, found in worlds[:500]:
        tied = {
            name: [
                (Detection(seen.box, 0.9 if rng.random() < 0.5 else seen.score), color)
                for seen, color in pairs
            ]
            for name, pairs in found.items()
        }
        shuffled = {
            str(name): [tied[str(name)][i] for i in rng.permutation(len(tied[str(name)]))]
            for name in rng.permutation(CLASSES)
        }
        assert rule(GENEVAL, line, shuffled) == rule(GENEVAL, line, tied)


def test_bounds_of_partial_credit(worlds: list[tuple[dict[str, Any], Colored]]) -> None:
    lowest = 0.0
    for line, found in worlds:
        ruling = rule(GENEVAL, line, found)
        assert 0 <= ruling.bounded <= 1 and ruling.released <= 1
        assert (ruling.bounded == 1) == (not ruling.strict_reason)
        lowest = min(lowest, ruling.released)
        if not line["exclude"]:
            assert ruling.correct or not ruling.strict_correct
    assert lowest < -1


def test_moving_the_whole_picture_changes_nothing(worlds: list[tuple[dict[str, Any], Colored]]) -> None:
    for line, found in worlds[:300]:
        moved = {
            name: [
                (Detection((b[0] + 64, b[1] - 32, b[2] + 64, b[3] - 32), seen.score), color)
                for seen, color in pairs
                for b in (seen.box,)
            ]
            for name, pairs in found.items()
        }
        assert answers(rule(GENEVAL, line, moved)) == answers(rule(GENEVAL, line, found))


def test_golden_cases(shared: Path) -> None:
    """Verdicts and released reward as computed by the published code, on objects above its threshold."""
    judge = Judge(0.3, 0.3, 16, 1.0, 0.1)
    file = shared / "golden" / "geneval_scoring_cases.json"
    if not file.is_file():
        pytest.skip(f"no golden cases at {file}")
    cases = json.loads(file.read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        found = {
            name: [
                (Detection(tuple(row[:4]), row[4]), color) for row, color in zip(rows, colors, strict=True)
            ]
            for name, rows in case["detections"].items()
            for colors in (case["colors"][name],)
        }
        ruling = rule(judge, case["metadata"], found)
        assert (ruling.correct, ruling.strict_correct) == (case["correct"], case["strict_correct"]), case
        assert ruling.released == case["reward"], case


# --- Requests


def edit(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(json.dumps(DOG_LEFT_OF_CAT))
    change(line)
    return line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line.pop("tag"), "tag must be"),
        (lambda line: line.update(tag=3), "tag must be"),
        (lambda line: line.pop("include"), "include must list"),
        (lambda line: line.update(include=[]), "include must list"),
        (lambda line: line.update(include={"class": "dog"}), "include must be a list"),
        (lambda line: line.update(include=["dog"]), r"include\[0\] must be an object"),
        (lambda line: line["include"][0].pop("class"), r"include\[0\].class"),
        (
            lambda line: line["include"][0].update(count=0),
            r"include\[0\].count must be a positive integer, got 0",
        ),
        (lambda line: line["include"][0].update(count=-1), "positive integer"),
        (lambda line: line["include"][0].update(count=1.0), "positive integer"),
        (lambda line: line["include"][0].update(count="2"), "positive integer, got '2'"),
        (lambda line: line["include"][0].update(count=True), "positive integer"),
        (lambda line: line["include"][0].pop("count"), "positive integer, got None"),
        (lambda line: line["include"][0].update(color=""), r"include\[0\].color"),
        (lambda line: line["include"][0].update(colour="red"), "got 'colour', which nothing scores"),
        (lambda line: line["include"][1].update(position=["beside", 0]), "got 'beside'"),
        (lambda line: line["include"][1].update(position="left of"), "must be a pair"),
        (lambda line: line["include"][1].update(position=["left of"]), "must be a pair"),
        (lambda line: line["include"][1].update(position=["left of", 1]), "before this one"),
        (lambda line: line["include"][1].update(position=["left of", 7]), "before this one"),
        (lambda line: line["include"][1].update(position=["left of", -1]), "before this one"),
        (lambda line: line["include"][1].update(position=["left of", "0"]), "before this one"),
        (lambda line: line["include"][0].update(position=["left of", 0]), "before this one"),
        (lambda line: line.update(exclude=[thing("cup", color="red")]), r"exclude\[0\] takes class, count"),
        (lambda line: line.update(exclude=[thing("cat", 1)]), "at least 1 and fewer than 1 'cat'"),
    ],
)
def test_requests_that_cannot_be_scored(change: Callable[[dict[str, Any]], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_request(edit(change))


def test_null_counts_as_absent() -> None:
    bare = metadata("x", thing("dog"))
    full = {**bare, "exclude": None, "include": [thing("dog", color=None, position=None)]}
    assert parse_request(full) == parse_request(bare)
