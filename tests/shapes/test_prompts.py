"""Prompts follow GenEval's schema and the splits keep apart what they promise."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

import stage.shapes
from stage.request import parse_request
from stage.shapes.prompts import HELD_OUT_COLORS, HELD_OUT_PAIRS, TASKS, splits
from stage.shapes.scenes import CLASSES, COLORS

SPLITS = splits()


def combinations(line: dict) -> set:
    """The class-colour and class-pair combinations a line names."""
    found: set = {(t["class"], t["color"]) for t in line["include"] if "color" in t}
    names = {t["class"] for t in line["include"]}
    return found | {frozenset(pair) for pair in itertools.combinations(sorted(names), 2)}


RESERVED = {(CLASSES[k], COLORS[c]) for k, c in HELD_OUT_COLORS} | {
    frozenset(CLASSES[k] for k in pair) for pair in HELD_OUT_PAIRS
}


@pytest.mark.parametrize("split", ["corpus", "train", "validation"])
def test_reserved_combinations_are_never_named(split: str) -> None:
    assert not [line["prompt"] for line in SPLITS[split] if combinations(line) & RESERVED]


def test_every_held_out_prompt_names_a_reserved_combination() -> None:
    assert all(combinations(line) & RESERVED for line in SPLITS["heldout"])
    assert set(Counter(line["tag"] for line in SPLITS["heldout"])) == set(TASKS) - {
        "single_object",
        "counting",
    }


def test_no_text_is_in_two_splits() -> None:
    texts = {name: {line["prompt"] for line in lines} for name, lines in SPLITS.items()}
    assert texts["train"] <= texts["corpus"]
    for a, b in itertools.combinations(("corpus", "validation", "heldout"), 2):
        assert not texts[a] & texts[b]


def test_validation_has_all_tasks_evenly() -> None:
    assert Counter(line["tag"] for line in SPLITS["validation"]) == dict.fromkeys(TASKS, 24)


def test_lines_say_what_geneval_says() -> None:
    lines = {line["prompt"]: line for line in itertools.chain(*SPLITS.values())}
    assert lines["a photo of three circles"] == {
        "tag": "counting",
        "include": [{"class": "circle", "count": 3}],
        "exclude": [{"class": "circle", "count": 4}],
        "prompt": "a photo of three circles",
    }
    # As in GenEval the object referred to comes first, the one that is placed second.
    assert lines["an icon of a ring above a circle"]["include"] == [
        {"class": "circle", "count": 1},
        {"class": "ring", "count": 1, "position": ["above", 0]},
    ]
    assert "a sketch of an orange square" in lines


def test_every_line_is_a_valid_request() -> None:
    for line in itertools.chain(SPLITS["train"], SPLITS["validation"], SPLITS["heldout"]):
        assert parse_request(line).tag in TASKS


@pytest.mark.parametrize("split", ["train", "validation", "heldout"])
def test_shipped_files_are_the_splits(split: str) -> None:
    path = Path(stage.shapes.__file__).parent / "assets" / f"{split}.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == SPLITS[split]
