"""Images before and after training, paired by prompt and seed, with the verdict on each."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stage.report.read import Evaluation

PAIRS_PER_TASK = 4
CHANGED = 8  # pairs shown of those that a training turned right, and of those it turned wrong


@dataclass(frozen=True)
class Picture:
    """One image: `source` is a data URI, None when the file is gone; `plan` what was written before it, if anything.

    `correct` is None where the score is no verdict.
    """

    role: str
    source: str | None
    correct: bool | None
    score: float
    reason: str
    plan: str | None = None


@dataclass(frozen=True)
class Pair:
    """The pictures of one prompt and sample, base first; one picture when only one model was evaluated."""

    prompt: str
    task: str
    sample: int
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Group:
    """Pairs under one heading."""

    title: str
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Gallery:
    """One split: the groups to show, and of all its pairs how many `gained` or `lost`: a correct verdict, or score."""

    split: str
    groups: tuple[Group, ...]
    total: int
    gained: int
    lost: int
    verdicts: bool


def galleries(evaluation: Evaluation) -> list[Gallery]:
    """For each split the first prompts of each task, unselected, then some whose verdict changed."""
    headline = evaluation.results["benchmark"]["headline"]
    images = evaluation.results["images"]
    verdicts = all(line["parts"][headline] in (0, 1) for line in images)
    return [
        _gallery(split, _by_place(images, split), evaluation.folder, headline, verdicts)
        for split in evaluation.results["scores"]
    ]


def data_uri(path: Path) -> str | None:
    """A PNG file as a data URI, None when there is no such file."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


Place = Sequence[Mapping[str, Any]]  # the lines of results.json for one (prompt, sample), base first


def _gallery(split: str, places: Sequence[Place], folder: Path, headline: str, verdicts: bool) -> Gallery:
    def shown(chosen: Iterable[Place], count: int) -> tuple[Pair, ...]:
        return tuple(_pair(place, folder, headline, verdicts) for place in islice(chosen, count))

    tasks = list(dict.fromkeys(place[0]["task"] for place in places))
    groups = [
        Group(
            task, shown((p for p in places if p[0]["task"] == task and p[0]["sample"] == 0), PAIRS_PER_TASK)
        )
        for task in tasks
    ]
    gained = [place for place in places if len(place) == 2 and _change(place, headline) > 0]
    lost = [place for place in places if len(place) == 2 and _change(place, headline) < 0]
    if not verdicts:  # the largest changes, the worst losses first
        gained.sort(key=lambda place: -_change(place, headline))
        lost.sort(key=lambda place: _change(place, headline))
    gain, loss = ("became right", "became wrong") if verdicts else ("rose", "fell")
    changed = ((gain, gained), (loss, lost))
    groups += [
        # Evenly spaced over the file, so that every task is seen.
        Group(
            f"{title}: {min(CHANGED, len(found))} of {len(found)}",
            shown(found[:: max(1, len(found) // CHANGED)] if verdicts else found, CHANGED),
        )
        for title, found in changed
        if found
    ]
    return Gallery(split, tuple(groups), len(places), len(gained), len(lost), verdicts)


def _by_place(images: Sequence[Mapping[str, Any]], split: str) -> list[Place]:
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for line in images:
        if line["split"] == split:
            found.setdefault((line["index"], line["sample"]), []).append(line)
    return [sorted(found[place], key=lambda line: line["model"] != "base") for place in sorted(found)]


def _change(place: Place, headline: str) -> float:
    return place[1]["parts"][headline] - place[0]["parts"][headline]


def _pair(place: Place, folder: Path, headline: str, verdicts: bool) -> Pair:
    pictures = tuple(
        Picture(
            role=line["model"],
            source=data_uri(folder / line["file"]),
            correct=line["parts"][headline] >= 1 if verdicts else None,
            score=line["parts"][headline],
            reason=line["reason"],
            plan=line.get("plan"),
        )
        for line in place
    )
    return Pair(place[0]["prompt"], place[0]["task"], place[0]["sample"], pictures)
