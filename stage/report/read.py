"""What a folder holds that a report can show: metrics.csv, config.yaml, image grids and results.json."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

METRICS, CONFIG, RESULTS = "metrics.csv", "config.yaml", "results.json"
X = "update"


@dataclass(frozen=True)
class Curve:
    """One metric: `x` updates (rollouts done) and `y` values, float `[n]`, without the updates that have none."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """results.json as written by evaluate.py, and the folder its file names are relative to."""

    folder: Path
    results: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run, an evaluation, or both; `curves` is empty and `evaluation` None where there is none.

    `grids` are the pictures training drew for fixed prompts, by update.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    grids: Mapping[int, Path]
    evaluation: Evaluation | None


def read_run(folder: Path) -> Run:
    """Read a run folder, with the newest evaluation in it, or the folder of one evaluation, with the run around it.

    Raises FileNotFoundError when there is neither metrics.csv nor results.json, ValueError for a damaged file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"a report needs a folder; {folder} is none. Give the folder of a run.")
    here = folder / RESULTS
    newest = here if here.is_file() else _newest(folder)
    around = _run_around(folder.resolve()) if here.is_file() else folder
    if newest is None and not (folder / METRICS).is_file():
        raise FileNotFoundError(
            f"a report needs {METRICS} from training or {RESULTS} from evaluation; {folder} holds neither. "
            "Give the folder of a run."
        )
    evaluation = None if newest is None else Evaluation(newest.parent, _read_results(newest))
    config = {} if around is None else _read_config(around / CONFIG)
    if not config and evaluation is not None:
        config = evaluation.results.get("trained_with") or evaluation.results["config"]
    return Run(
        folder=folder,
        name=folder.resolve().name if around is None else around.resolve().name,
        config=config,
        curves={} if around is None else read_curves(around / METRICS),
        grids={} if around is None else _grids(around / "images"),
        evaluation=evaluation,
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """The columns of metrics.csv by name, ordered by update; no file, no curves.

    Cells without a finite number are left out.

    A row that was cut off by a kill has fewer cells than the header and counts for those it has.

    Raises ValueError for a file without the column `update`.
    """
    if not path.is_file():
        return {}
    points: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if X not in (reader.fieldnames or ()):
            raise ValueError(
                f"{path} must have a column {X!r}, it has {reader.fieldnames}; give a folder of train.py"
            )
        for row in reader:
            if not row[X]:
                continue
            for name, cell in row.items():
                if (
                    name not in (X, None)
                    and cell
                    and math.isfinite(value := _number(path, reader.line_num, cell))
                ):
                    points.setdefault(name, {})[int(float(row[X]))] = value
    return {
        name: Curve(np.array(sorted(values)), np.array([values[x] for x in sorted(values)]))
        for name, values in points.items()
    }


def _number(path: Path, line: int, cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise ValueError(
            f"{path}:{line}: metrics are numbers, got {cell!r}; repair or remove the line"
        ) from error


def _read_results(path: Path) -> Mapping[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run evaluate.py again to write it anew") from error
    missing = {"scores", "images", "models", "benchmark", "config"} - set(results)
    if missing:
        raise ValueError(f"{path} was not written by evaluate.py: it lacks {', '.join(sorted(missing))}")
    return results


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is damaged ({str(error).splitlines()[0]}); restore it from the run's checkpoint"
        ) from error


def _newest(folder: Path) -> Path | None:
    found = [*folder.glob(f"evaluation/*/{RESULTS}"), *folder.glob(f"evaluation/*/*/{RESULTS}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _run_around(folder: Path) -> Path | None:
    return next((parent for parent in folder.parents if (parent / METRICS).is_file()), None)


def _grids(folder: Path) -> dict[int, Path]:
    """`update_00040.png` by its number."""
    numbers = {path: path.stem.removeprefix("update_") for path in folder.glob("update_*.png")}
    return {int(number): path for path, number in sorted(numbers.items()) if number.isdigit()}
