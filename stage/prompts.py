"""Make a training list in GenEval's schema that shares no prompt with lists it is to be evaluated on.

    python -m stage.prompts output=train.jsonl                          # without GenEval's 553 evaluation prompts
    python -m stage.prompts output=train.jsonl exclude=[more.jsonl]     # and without those of other lists

The wording is GenEval's own (djghosh13/geneval prompts/create_prompts.py), its plurals (`benchs`) included, since the
evaluation asks in these words. Differences from that file:

1. Every prompt of a task can be drawn and none is drawn twice; there, repeats are thrown away afterwards.
2. A prompt is left out when an excluded one has the same words or asks for the same picture: `a cat and a dog` for
   `a dog and a cat`, and `a cat right of a dog` for `a dog left of a cat`. GenEval's own are known by fingerprints.
3. Shares of the tasks are set; there, each has 100.
4. Randomness is Philox of (seed, task): a longer list begins each task as a shorter one does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import DictConfig

from stage import fingerprints, launch
from stage.fingerprints import of_picture, of_text
from stage.request import RELATIONS, parse_request

# The 80 classes of COCO in its order.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase",
    "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake",
    "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse",
    "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator",
    "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLORED = CLASSES[1:]  # GenEval asks for no coloured person

Line = dict[str, Any]


def article(words: str) -> str:
    """`an apple`, `a red apple`."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    """GenEval's plural: `buses`, and also `benchs` and `sheeps`."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def wording(tag: str, include: Sequence[Mapping[str, Any]]) -> str:
    """The prompt that GenEval writes for these objects."""
    first = include[0]
    things = [f"{item['color']} {item['class']}" if "color" in item else item["class"] for item in include]
    if tag == "counting":
        return f"a photo of {NUMBERS[first['count']]} {plural(first['class'])}"
    if tag == "position":
        relation = include[1]["position"][0]
        return f"a photo of {article(things[1])} {relation} {article(things[0])}"
    return "a photo of " + " and ".join(article(thing) for thing in things)


def _thing(name: str, color: str | None = None) -> Line:
    return {"class": name, "count": 1} if color is None else {"class": name, "count": 1, "color": color}


def _pair(index: int, count: int) -> tuple[int, int]:
    """Ordered pair `index` of the `count * (count - 1)` pairs of two different numbers below `count`."""
    first, second = divmod(index, count - 1)
    return first, second + (second >= first)


def _single_object(index: int) -> Line:
    return {"include": [_thing(CLASSES[index])]}


def _two_object(index: int) -> Line:
    return {"include": [_thing(CLASSES[i]) for i in _pair(index, len(CLASSES))]}


def _counting(index: int) -> Line:
    name, count = CLASSES[index // 3], index % 3 + 2
    return {"include": [{"class": name, "count": count}], "exclude": [{"class": name, "count": count + 1}]}


def _colors(index: int) -> Line:
    return {"include": [_thing(COLORED[index // len(COLORS)], COLORS[index % len(COLORS)])]}


def _position(index: int) -> Line:
    place, relation = divmod(index, len(RELATIONS))
    of, to = (CLASSES[i] for i in _pair(place, len(CLASSES)))
    return {"include": [_thing(to), {**_thing(of), "position": [RELATIONS[relation], 0]}]}


def _color_attr(index: int) -> Line:
    place, paint = divmod(index, len(COLORS) * (len(COLORS) - 1))
    names, colors = _pair(place, len(COLORED)), _pair(paint, len(COLORS))
    return {"include": [_thing(COLORED[i], COLORS[j]) for i, j in zip(names, colors, strict=True)]}


# Each task: how many prompts it has, and the one of a number below that.
TASKS: Mapping[str, tuple[int, Callable[[int], Line]]] = {
    "single_object": (len(CLASSES), _single_object),
    "two_object": (len(CLASSES) * (len(CLASSES) - 1), _two_object),
    "counting": (len(CLASSES) * 3, _counting),  # two, three and four of each
    "colors": (len(COLORED) * len(COLORS), _colors),
    "position": (len(CLASSES) * (len(CLASSES) - 1) * len(RELATIONS), _position),
    "color_attr": (len(COLORED) * (len(COLORED) - 1) * len(COLORS) * (len(COLORS) - 1), _color_attr),
}


def prompt_line(tag: str, index: int) -> Line:
    """Prompt `index` of a task in GenEval's schema."""
    line = TASKS[tag][1](index)
    return {"tag": tag, **line, "prompt": wording(tag, line["include"])}


def draw(tag: str, wanted: int, seed: int, excluded: set[str]) -> Iterator[Line]:
    """At most `wanted` different prompts of a task, none of whose fingerprints is in `excluded`."""
    key = np.array([seed, list(TASKS).index(tag)], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(TASKS[tag][0]), kind="stable")
    found = 0
    for index in order.tolist():
        if found == wanted:
            return
        line = prompt_line(tag, index)
        if excluded.isdisjoint((of_text(line["prompt"]), of_picture(parse_request(line)))):
            found += 1
            yield line


def training_list(
    count: int, shares: Mapping[str, float], seed: int, excluded: set[str]
) -> tuple[list[Line], dict[str, int]]:
    """About `count` prompts in proportion to `shares`, and how many a task fell short of its share, by task.

    Raises:
        ValueError: for a task that is not one of GenEval's, or shares that are none.
    """
    unknown = [tag for tag in shares if tag not in TASKS]
    if unknown or not all(share >= 0 for share in shares.values()) or not sum(shares.values()) > 0:
        raise ValueError(
            f"shares are numbers of at least 0 for {', '.join(TASKS)}, one above 0; got {dict(shares)}; mend them"
        )
    if count < 1 or not 0 <= seed < 2**64:
        raise ValueError(f"count is at least 1 and seed in [0, 2**64); got {count} and {seed}; choose others")
    lines: list[Line] = []
    short = {}
    for tag, share in shares.items():
        wanted = round(count * share / sum(shares.values()))
        found = list(draw(tag, wanted, seed, excluded))
        lines += found
        if len(found) < wanted:
            short[tag] = wanted - len(found)
    return lines, short


def write(config: DictConfig) -> None:
    """Write the list that the configuration asks for."""
    from stage.whole_files import atomic_write

    output = Path(str(config.output)).expanduser()
    excluded = set() if config.evaluated is None else fingerprints.read(str(config.evaluated))
    for path in config.exclude:
        excluded |= fingerprints.of_list(str(path))
    lines, short = training_list(config.count, config.shares, config.seed, excluded)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as temporary:
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    print("\n".join(told(lines, short, excluded, launch.short(output))), flush=True)


def told(lines: Sequence[Line], short: Mapping[str, int], excluded: set[str], file: str) -> list[str]:
    """What was written and what was left out, in sentences; the tasks that ran out first."""
    found = Counter(line["tag"] for line in lines)
    said = [
        f"{tag}: {found[tag]} prompts in place of the {found[tag] + missing} of its share, which is every one of its "
        f"{TASKS[tag][0]} that no excluded list asks for"
        for tag, missing in short.items()
    ]
    pictures = sum(fingerprint.startswith("picture") for fingerprint in excluded)
    out = (
        f"; none asks for one of the {pictures} different pictures of the excluded lists" if pictures else ""
    )
    tasks = ", ".join(f"{tag} {count}" for tag, count in found.items())
    return [*said, f"{len(lines)} prompts in {file} ({tasks}){out}"]


@hydra.main(config_path="../conf", config_name="prompts", version_base="1.3")
def main(config: DictConfig) -> None:
    with launch.mistakes_in_one_line():
        write(config)


if __name__ == "__main__":
    launch.run(main)
