"""Two evaluations prompt by prompt: `python -m stage.report compare A B` prints this table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stage.benchmarks.accumulate import PromptScores
from stage.benchmarks.intervals import OVERALL, Bootstrap
from stage.benchmarks.published import Published
from stage.report.comparable import check_prompts, check_scorers
from stage.report.read import Evaluation, read_run
from stage.report.tables import cell, markdown

BOOTSTRAP = Bootstrap(0.95, 10000, 0)  # where the evaluations do not say how their intervals were made
Key = tuple[int, int]  # line of the prompt file, sample


@dataclass(frozen=True)
class PairedTable:
    """One part of one split: rows of text, headings first; `published` likewise, None where there is nothing."""

    title: str
    rows: list[list[str]]
    published: list[list[str]] | None


def paired_markdown(first: Path, second: Path) -> str:
    """The tables of two evaluations, B minus A with intervals over prompts, in markdown.

    Raises ValueError where the two were not evaluated, or on other prompts or images, or by another scorer.
    """
    pair = (_evaluation(first), _evaluation(second))
    tables = paired_tables(*pair)
    lines = [f"A: {first} ({_role(pair[0])})  ", f"B: {second} ({_role(pair[1])})", ""]
    lines += [f"{note}  " for note in _notes(*pair)]
    for table in tables:
        lines += [f"## {table.title}", "", markdown(table.rows[0], table.rows[1:]), ""]
        if table.published is not None:
            source = pair[0].results["benchmark"]["published"]["source"]
            lines += [f"Published: {source}", "", markdown(table.published[0], table.published[1:]), ""]
    return "\n".join(lines)


def paired_tables(first: Evaluation, second: Evaluation) -> list[PairedTable]:
    """A table for each split and part that counts."""
    check_prompts(first, second)
    check_scorers(first, second)
    benchmark = first.results["benchmark"]
    return [
        _table(first, second, split, part)
        for split in first.results["scores"]
        for part in (benchmark["headline"], *benchmark.get("beside", []))
    ]


def _table(first: Evaluation, second: Evaluation, split: str, part: str) -> PairedTable:
    lines = [_lines(item, split) for item in (first, second)]
    _same_images(first, second, split, *lines)
    means = [
        _means(item, part, f"{part} of {name} on {split}") for item, name in zip(lines, "AB", strict=True)
    ]
    places: dict[str, list[int]] = {}
    for (index, _), line in sorted(lines[0].items()):
        for row in line.get("rows", [line["task"]]):
            if index not in places.setdefault(row, []):
                places[row].append(index)
    order = {index: place for place, index in enumerate(sorted({index for index, _ in lines[0]}))}
    groups = [{row: found[[order[i] for i in at]] for row, at in places.items()} for found in means]
    macro = first.results["benchmark"].get("macro", True)
    overall = [
        list(found.values()) if macro else [values] for found, values in zip(groups, means, strict=True)
    ]
    bootstrap = _bootstrap(first)
    columns = [bootstrap.table(found, whole) for found, whole in zip(groups, overall, strict=True)]
    difference = bootstrap.paired(groups[0], groups[1], (overall[0], overall[1]))
    rows = [["task", "prompts", "A", "B", "B - A"]]
    for row in [*places, OVERALL]:
        cells = [cell(asdict(column[row]), False) for column in columns]
        cells.append(cell(asdict(difference[row]), True))
        shown = [f"{one.text} ({one.interval})" if one.interval else one.text for one in cells]
        rows.append([row, str(difference[row].prompts), *shown])
    published = first.results["benchmark"].get("published")
    beside = None
    if published is not None and part == first.results["benchmark"]["headline"]:
        ours = {row: {n: asdict(c[row]) for n, c in zip("AB", columns, strict=True)} for row in columns[0]}
        beside = Published(**published).beside(ours)
    return PairedTable(f"{split}: {part}", rows, beside)


def _evaluation(folder: Path) -> Evaluation:
    found = read_run(folder).evaluation
    if found is None:
        raise ValueError(
            f"{folder} was not evaluated, so nothing can be paired; run evaluate.py for it first"
        )
    return found


def _role(evaluation: Evaluation) -> str:
    """The model that an evaluation is about: the tuned one, or the one that stands alone."""
    roles = list(dict.fromkeys(line["model"] for line in evaluation.results["images"]))
    return "tuned" if "tuned" in roles else roles[0]


def _lines(evaluation: Evaluation, split: str) -> dict[Key, Mapping[str, Any]]:
    role = _role(evaluation)
    return {
        (line["index"], line["sample"]): line
        for line in evaluation.results["images"]
        if line["model"] == role and line["split"] == split
    }


def _same_images(
    first: Evaluation,
    second: Evaluation,
    split: str,
    mine: Mapping[Key, Mapping[str, Any]],
    others: Mapping[Key, Mapping[str, Any]],
) -> None:
    """Raise ValueError, with counts, unless both judged the same samples of the same prompts."""
    counts = Counter(
        {
            f"are in {first.folder} alone": len(mine.keys() - others.keys()),
            f"are in {second.folder} alone": len(others.keys() - mine.keys()),
            "have another prompt": sum(
                mine[key]["prompt"] != others[key]["prompt"] for key in mine.keys() & others.keys()
            ),
        }
    )
    faults = [f"{number} {what}" for what, number in counts.items() if number]
    if faults:
        raise ValueError(
            f"evaluations are paired image by image; of {len(mine.keys() | others.keys())} on {split} "
            f"{', '.join(faults)}. Nothing was averaged: evaluate both with the same splits and images_per_prompt"
        )


def _means(lines: Mapping[Key, Mapping[str, Any]], part: str, name: str) -> np.ndarray:
    """The mean of each prompt over its samples, float64 `[P]`, in file order."""
    order = {index: place for place, index in enumerate(sorted({index for index, _ in lines}))}
    scores = PromptScores(len(order), 1 + max(sample for _, sample in lines), name)
    scores.update(
        [order[index] for index, _ in lines],
        [sample for _, sample in lines],
        [line["parts"][part] for line in lines.values()],
    )
    return scores.table().mean(axis=1)


def _bootstrap(evaluation: Evaluation) -> Bootstrap:
    known = evaluation.results["config"].get("intervals")
    if not isinstance(known, Mapping):
        return BOOTSTRAP
    return Bootstrap(known["confidence"], known["resamples"], known["seed"])


def _notes(first: Evaluation, second: Evaluation) -> list[str]:
    """What else differs between how the images were drawn, a line each; the reader has to know."""
    notes = []
    settings = [item.results["settings"].get(_role(item), {}) for item in (first, second)]
    for key in ("sampler", "template", "seed", "dtype"):
        mine, other = (found.get(key) for found in settings)
        if mine != other:
            notes.append(f"Drawn differently, {key}: A {mine}, B {other}")
    return notes
