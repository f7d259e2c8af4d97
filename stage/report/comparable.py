"""Which evaluations may be laid side by side: those of the same prompts, judged by the same scorer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from stage.provenance import changed_files
from stage.report.read import Evaluation

# Where a scorer runs and where its weights lie, which their hashes stand for; not what it says.
ELSEWHERE = ("device", "batch_size", "path", "revision", "url", "folder")


def check_scorers(first: Evaluation, second: Evaluation) -> None:
    """Raise ValueError unless both were judged by the same class, weights and settings; counts what differs.

    Older results that do not name their scorer are let through.
    """
    faults = []
    before, now = (item.results.get("judge") for item in (first, second))
    if before and now and before["class"] != now["class"]:
        faults.append(f"the class, {before['class']} and {now['class']}")
    elif before and now and (files := changed_files(before["weights"], now["weights"])):
        faults.append(f"{len(files)} weight files ({', '.join(files[:3])})")
    settings = [dict(flat(_settings(item))) for item in (first, second)]
    if all(settings):
        names = sorted(set(settings[0]) | set(settings[1]))
        differing = [name for name in names if settings[0].get(name) != settings[1].get(name)]
        if differing:
            shown = ", ".join(
                f"{name} {settings[0].get(name)} and {settings[1].get(name)}" for name in differing[:3]
            )
            faults.append(f"{len(differing)} settings ({shown})")
    if faults:
        raise ValueError(
            f"scores can be compared when one scorer gave them; {first.folder} and {second.folder} differ in "
            f"{' and '.join(faults)}. Score both with the same: the images lie on disk, so the same command of "
            "evaluate.py judges them anew"
        )


def check_prompts(first: Evaluation, second: Evaluation) -> None:
    """Raise ValueError unless both are of one benchmark, with the same prompts and part that counts."""
    for key in ("name", "headline", "prompts_sha256"):
        values = [item.results["benchmark"].get(key) for item in (first, second)]
        if None not in values and values[0] != values[1]:
            raise ValueError(
                f"evaluations are paired prompt by prompt; in {key} {first.folder} has {values[0]}, "
                f"{second.folder} has {values[1]}. Evaluate both on the same prompt files"
            )


def _settings(evaluation: Evaluation) -> Any:
    benchmark = evaluation.results["config"].get("benchmark")
    return benchmark.get("scorer") if isinstance(benchmark, Mapping) else None


def flat(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as JSON) of settings that can move a score; null is what an older version did not know."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            place = key in ELSEWHERE or (key == "weights" and isinstance(value, str))
            if not place:
                yield from flat(value, f"{name}.{key}" if name else str(key))
    elif node is not None:
        yield name, json.dumps(node, sort_keys=True)
