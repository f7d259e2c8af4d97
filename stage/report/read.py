"""What a folder holds that a report can show: metrics.csv, config.yaml, image grids and results.json."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

METRICS, CONFIG, RESULTS, CODE, PACKED = (
    "metrics.csv",
    "config.yaml",
    "results.json",
    "code.json",
    "packed.json",
)
X = "update"
LEARNING = ("loss/", "policy/", "reward/")  # metrics that are finite in every run that has not diverged


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

    `grids` are the pictures training drew for fixed prompts, by update. `evaluation` is the newest one, `evaluations`
    the newest of each checkpoint and benchmark by their names. `code` are the versions of the program that made the
    run, oldest first. `not_finite` is the first metric and update where something was NaN or infinite. `seconds` is
    wall time by step, where `stage.pack` ran it.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Curve]
    grids: Mapping[int, Path]
    evaluation: Evaluation | None
    evaluations: Mapping[tuple[str, str], Evaluation] = field(default_factory=dict)
    code: Sequence[Mapping[str, Any]] = ()
    not_finite: tuple[str, int] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


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
    cells = {} if around is None else read_cells(around / METRICS)
    return Run(
        folder=folder,
        name=folder.resolve().name if around is None else around.resolve().name,
        config=config,
        curves=curves_of(cells),
        grids={} if around is None else _grids(around / "images"),
        evaluation=evaluation,
        evaluations={} if around is None else _evaluations(around),
        code=[] if around is None else _read_json(around / CODE, []),
        not_finite=first_not_finite(cells),
        seconds={} if around is None else _read_json(around / PACKED, {}).get("seconds", {}),
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """The columns of metrics.csv as `read_cells` finds them, without cells that are not finite."""
    return curves_of(read_cells(path))


Cells = dict[str, dict[int, float]]  # by metric and update


def read_cells(path: Path) -> Cells:
    """The numbers of metrics.csv by metric and update, NaN and infinity included; no file, no numbers.

    A row that was cut off by a kill has fewer cells than the header and counts for those it has.

    Raises ValueError for a file without the column `update`.
    """
    found: Cells = {}
    if not path.is_file():
        return found
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
                if name not in (X, None) and cell:
                    found.setdefault(name, {})[int(float(row[X]))] = _number(path, reader.line_num, cell)
    return found


def curves_of(cells: Mapping[str, Mapping[int, float]]) -> dict[str, Curve]:
    """One curve a metric, ordered by update, of what is finite."""
    finite = {n: {x: y for x, y in values.items() if math.isfinite(y)} for n, values in cells.items()}
    return {
        name: Curve(np.array(sorted(values)), np.array([values[x] for x in sorted(values)]))
        for name, values in finite.items()
        if values
    }


def first_not_finite(cells: Mapping[str, Mapping[int, float]]) -> tuple[str, int] | None:
    """Metric and update of the first NaN or infinity among those that say how learning goes."""
    found = [
        (update, name)
        for name, values in cells.items()
        if name.startswith(LEARNING)
        for update, value in values.items()
        if not math.isfinite(value)
    ]
    return None if not found else (min(found)[1], min(found)[0])


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


def _read_json(path: Path, otherwise: Any) -> Any:
    if not path.is_file():
        return otherwise
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to do without") from error


def _evaluations(folder: Path) -> dict[tuple[str, str], Evaluation]:
    """By checkpoint and benchmark: evaluation/last/results.json, evaluation/last/drift/results.json and so on."""
    found: dict[tuple[str, str], Evaluation] = {}
    for path in [*folder.glob(f"evaluation/*/{RESULTS}"), *folder.glob(f"evaluation/*/*/{RESULTS}")]:
        results = _read_results(path)
        checkpoint = path.relative_to(folder / "evaluation").parts[0]
        found[checkpoint, str(results["benchmark"].get("name", "benchmark"))] = Evaluation(
            path.parent, results
        )
    return dict(sorted(found.items()))


def _newest(folder: Path) -> Path | None:
    found = [*folder.glob(f"evaluation/*/{RESULTS}"), *folder.glob(f"evaluation/*/*/{RESULTS}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _run_around(folder: Path) -> Path | None:
    return next((parent for parent in folder.parents if (parent / METRICS).is_file()), None)


def _grids(folder: Path) -> dict[int, Path]:
    """`update_00040.png` by its number."""
    numbers = {path: path.stem.removeprefix("update_") for path in folder.glob("update_*.png")}
    return {int(number): path for path, number in sorted(numbers.items()) if number.isdigit()}
