"""Images before and after training, paired by prompt and seed, with the verdict on each."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stage.report.read import Evaluation

MOST = 1200  # pairs of a split on a page: about 15 MB of pictures
SMALL = 128  # pixels a side up to which a picture is shown as it is
SIDE = 192  # pixels a side of others
NAMES = {
    "worse": ("became wrong", "fell"),
    "better": ("became right", "rose"),
    "same": ("unchanged", "equal"),
}
ALONE = {"wrong": "wrong", "right": "right"}


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
    """The pictures of one prompt and sample, base first; one picture when only one model was evaluated.

    `change` is tuned minus base, 0 for one picture; `outcome` is a key of `Gallery.outcomes`, and `place` that of the
    pair in the prompt file.
    """

    prompt: str
    task: str
    sample: int
    place: int
    change: float
    outcome: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Gallery:
    """One split: pairs, the worst regressions first, and what they can be filtered by.

    Of its `total` pairs all are in `pairs`, or `MOST` of them; `tasks` and `outcomes` count all. An outcome is
    `worse`, `better` or `same` of two models, `right` or `wrong` of one that got verdicts.
    """

    split: str
    pairs: tuple[Pair, ...]
    total: int
    tasks: Mapping[str, int]
    outcomes: Mapping[str, int]
    names: Mapping[str, str]
    verdicts: bool
    paired: bool


def galleries(evaluation: Evaluation) -> list[Gallery]:
    """A gallery of each split."""
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


def thumbnail(path: Path) -> str | None:
    """A picture as a data URI, at most `SIDE` pixels a side; None when there is no such file."""
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        if picture.format == "PNG" and max(picture.size) <= SMALL:
            return data_uri(path)
        smaller = picture.convert("RGB")
    smaller.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    smaller.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


Place = Sequence[Mapping[str, Any]]  # the lines of results.json for one (prompt, sample), base first


def _gallery(split: str, places: Sequence[Place], folder: Path, headline: str, verdicts: bool) -> Gallery:
    paired = any(len(place) == 2 for place in places)
    names = {key: pair[0 if verdicts else 1] for key, pair in NAMES.items()} if paired else ALONE
    outcomes = Counter(_outcome(place, headline) for place in places)
    shown = sorted(_chosen(places, headline), key=lambda number: (_change(places[number], headline), number))
    return Gallery(
        split=split,
        pairs=tuple(_pair(places[number], number, folder, headline, verdicts) for number in shown),
        total=len(places),
        tasks=Counter(place[0]["task"] for place in places),
        outcomes={key: outcomes[key] for key in names if outcomes[key]} if paired or verdicts else {},
        names=names,
        verdicts=verdicts,
        paired=paired,
    )


def _chosen(places: Sequence[Place], headline: str) -> list[int]:
    """Numbers of the pairs to show: all, or the worst, the best and the first of the file, a third each."""
    numbers = list(range(len(places)))
    if len(numbers) <= MOST:
        return numbers
    by_change = sorted(numbers, key=lambda number: _change(places[number], headline))
    ends = [*by_change[: MOST // 3], *by_change[-(MOST // 3) :]]
    # The first sample of every prompt comes before the second of any.
    first = sorted(numbers, key=lambda number: (places[number][0]["sample"], number))
    return list(dict.fromkeys([*ends, *first]))[:MOST]


def _by_place(images: Sequence[Mapping[str, Any]], split: str) -> list[Place]:
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for line in images:
        if line["split"] == split:
            found.setdefault((line["index"], line["sample"]), []).append(line)
    return [sorted(found[place], key=lambda line: line["model"] != "base") for place in sorted(found)]


def _change(place: Place, headline: str) -> float:
    return place[1]["parts"][headline] - place[0]["parts"][headline] if len(place) == 2 else 0.0


def _outcome(place: Place, headline: str) -> str:
    if len(place) == 1:
        return "right" if place[0]["parts"][headline] >= 1 else "wrong"
    change = _change(place, headline)
    return "worse" if change < 0 else "better" if change > 0 else "same"


def _pair(place: Place, number: int, folder: Path, headline: str, verdicts: bool) -> Pair:
    pictures = tuple(
        Picture(
            role=line["model"],
            source=thumbnail(folder / line["file"]),
            correct=line["parts"][headline] >= 1 if verdicts else None,
            score=line["parts"][headline],
            reason=line["reason"],
            plan=line.get("plan"),
        )
        for line in place
    )
    first = place[0]
    return Pair(
        prompt=first["prompt"],
        task=first["task"],
        sample=first["sample"],
        place=number,
        change=_change(place, headline),
        outcome=_outcome(place, headline),
        pictures=pictures,
    )
