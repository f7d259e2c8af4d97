"""A run reduced to what an ablation reads of it, without a path of the machine it ran on: small enough to commit."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stage.loggers import read_metrics
from stage.pack.plan import RECORD, PackedRun, read_record

# Columns of metrics.csv that pages about several runs show, and those that say what it cost.
KEPT = (
    "update",
    "reward/mean",
    "reward/std",
    "reward/informative_groups",
    "reward/entropy_active_groups",
    "validation/strict",
    "validation/reward",
    "policy/entropy",
    "reference/entropy",
    "policy/kl",
    "policy/gradient_norm",
    "weights/similarity_mean",
    "weights/advantage_mean",
    "weights/kl_mean",
    "time/images_per_second",
    "time/total",
)
RESULTS = ("format", "benchmark", "created", "judge", "settings", "versions", "git", "timing", "scores")
MODEL = ("sha256", "update")
DIGITS = 6  # significant digits of a metric


def thin(run: PackedRun) -> Iterator[tuple[str, bytes]]:
    """Names in the run's folder and what they hold: settings, the kept metrics, scores without single images."""
    config = run.folder / "config.yaml"
    if config.is_file():
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        place = str(settings["output"])
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).replace(place, run.name)
        yield "config.yaml", text.encode()
    if (run.folder / "metrics.csv").is_file():
        yield "metrics.csv", _metrics(run.folder / "metrics.csv")
    for name in ("code.json", "reward.json"):
        if (run.folder / name).is_file():
            yield name, (run.folder / name).read_bytes()
    if (run.folder / RECORD).is_file():
        yield RECORD, _json(read_record(run.folder))
    for path in sorted((run.folder / "evaluation").rglob("results.json")):
        yield path.relative_to(run.folder).as_posix(), _results(path)


def _metrics(path: Path) -> bytes:
    rows = read_metrics(path)
    columns = [name for name in KEPT if any(name in row for row in rows)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_short(row[name]) if name in row else "" for name in columns])
    return file.getvalue().encode()


def _short(cell: str) -> str:
    return cell if cell.isdigit() else f"{float(cell):.{DIGITS}g}"


def _results(path: Path) -> bytes:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    models = {role: {key: model.get(key) for key in MODEL} for role, model in found["models"].items()}
    kept = {key: found.get(key) for key in RESULTS}
    return _json({**kept, "models": models, "config": {}, "trained_with": None, "images": []})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
