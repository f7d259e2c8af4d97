"""The prompts of the embedded world: GenEval's six tasks in its exact metadata schema, in three splits.

Prompts whose class-colour or class-pair combination is reserved form the held-out split: neither pretraining nor
training ever shows or names such a combination. Of the others, some texts are kept for validation; the rest is the
corpus.

    python -m stage.shapes.prompts        writes assets/train.jsonl, validation.jsonl, heldout.jsonl
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stage.shapes.scenes import CLASSES, COLORS, PLURALS

MEDIA = (
    "photo", "picture", "drawing", "painting", "image", "sketch",
    "print", "sticker", "poster", "icon", "illustration", "rendering",
)  # fmt: skip
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}

# Every class loses two colours and every class meets one other class never.
HELD_OUT_COLORS = frozenset((kind, (2 * kind + shift) % 10) for kind in range(6) for shift in (0, 5))
HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in ((0, 3), (1, 5), (2, 4)))

Line = dict[str, Any]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _line(
    tag: str, medium: str, content: str, include: list[Line], exclude: list[Line] | None = None
) -> Line:
    line: Line = {"tag": tag, "include": include}
    if exclude:
        line["exclude"] = exclude
    line["prompt"] = f"{_article(medium)} of {content}"
    return line


def _one(kind: int, color: int | None = None) -> Line:
    thing: Line = {"class": CLASSES[kind], "count": 1}
    return thing if color is None else {**thing, "color": COLORS[color]}


def _named(kind: int, color: int | None = None) -> str:
    return _article(CLASSES[kind] if color is None else f"{COLORS[color]} {CLASSES[kind]}")


def _single_object(medium: str) -> Iterator[tuple[Line, bool]]:
    for kind in range(len(CLASSES)):
        yield _line("single_object", medium, _named(kind), [_one(kind)]), False


def _two_object(medium: str) -> Iterator[tuple[Line, bool]]:
    for a, b in itertools.permutations(range(len(CLASSES)), 2):
        line = _line("two_object", medium, f"{_named(a)} and {_named(b)}", [_one(a), _one(b)])
        yield line, frozenset((a, b)) in HELD_OUT_PAIRS


def _counting(medium: str) -> Iterator[tuple[Line, bool]]:
    for kind, (count, word) in itertools.product(range(len(CLASSES)), NUMBERS.items()):
        include = [{"class": CLASSES[kind], "count": count}]
        exclude = [{"class": CLASSES[kind], "count": count + 1}]
        yield _line("counting", medium, f"{word} {PLURALS[kind]}", include, exclude), False


def _colors(medium: str) -> Iterator[tuple[Line, bool]]:
    for kind, color in itertools.product(range(len(CLASSES)), range(len(COLORS))):
        line = _line("colors", medium, _named(kind, color), [_one(kind, color)])
        yield line, (kind, color) in HELD_OUT_COLORS


def _position(medium: str) -> Iterator[tuple[Line, bool]]:
    for (target, moved), relation in itertools.product(
        itertools.permutations(range(len(CLASSES)), 2), RELATIONS
    ):
        include = [_one(target), {**_one(moved), "position": [relation, 0]}]
        line = _line("position", medium, f"{_named(moved)} {relation} {_named(target)}", include)
        yield line, frozenset((target, moved)) in HELD_OUT_PAIRS


def _color_attr(medium: str) -> Iterator[tuple[Line, bool]]:
    for a, b in itertools.permutations(range(len(CLASSES)), 2):
        for color_a, color_b in itertools.permutations(range(len(COLORS)), 2):
            include = [_one(a, color_a), _one(b, color_b)]
            held_out = (
                frozenset((a, b)) in HELD_OUT_PAIRS
                or (a, color_a) in HELD_OUT_COLORS
                or (b, color_b) in HELD_OUT_COLORS
            )
            line = _line("color_attr", medium, f"{_named(a, color_a)} and {_named(b, color_b)}", include)
            yield line, held_out


_GENERATORS = (_single_object, _two_object, _counting, _colors, _position, _color_attr)


def _shuffle_key(line: Line) -> bytes:
    """An order that depends on the text alone, so that a split does not change when prompts are added elsewhere."""
    return hashlib.blake2b(line["prompt"].encode(), digest_size=8).digest()


def splits(
    validation_per_task: int = 24, heldout_per_task: int = 24, train_per_task: int = 300
) -> dict[str, list[Line]]:
    """All prompts by split: `corpus` (pretraining), `train` (its first lines by task), `validation`, `heldout`.

    The held-out split has the four tasks that name a colour or a pair; the other two name neither.
    """
    found: dict[str, list[Line]] = {"corpus": [], "train": [], "validation": [], "heldout": []}
    for generate in _GENERATORS:
        pairs = [pair for medium in MEDIA for pair in generate(medium)]
        seen = sorted((line for line, held_out in pairs if not held_out), key=_shuffle_key)
        reserved = sorted((line for line, held_out in pairs if held_out), key=_shuffle_key)
        corpus = seen[validation_per_task:]
        found["validation"] += seen[:validation_per_task]
        found["corpus"] += corpus
        found["train"] += corpus[:train_per_task]
        found["heldout"] += reserved[:heldout_per_task]
    return found


def main() -> None:
    """Writes the three files that training and evaluation read."""
    folder = Path(__file__).parent / "assets"
    folder.mkdir(exist_ok=True)
    for name, lines in splits().items():
        if name != "corpus":
            path = folder / f"{name}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            print(f"{path}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
