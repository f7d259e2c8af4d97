"""results.json: the numbers of an evaluation with everything needed to repeat them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stage.benchmarks import provenance
from stage.benchmarks.adding import Tables
from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.evaluation import Candidate, Judged
from stage.benchmarks.images import write_atomic
from stage.benchmarks.intervals import OVERALL
from stage.code_version import code_record
from stage.provenance import scorer_record

FORMAT = 1  # of results.json
RESULTS = "results.json"


def compose_results(
    *,
    benchmark: Benchmark,
    candidates: Sequence[Candidate],
    config: Mapping[str, Any],
    trained_with: Mapping[str, Any] | None,
    timing: Mapping[str, Mapping[str, float]],
    scores: Mapping[str, Tables],
    judged: Sequence[Judged],
    source: Path,
) -> dict[str, Any]:
    """Everything that results.json says; file names in it are relative to the folder of the last candidate.

    Args:
        config: of the evaluation; trained_with: of the training run, None where that is not known.
        source: folder of the program, for the commit it stands at.
    """
    return {
        "format": FORMAT,
        "benchmark": {
            "name": benchmark.name,
            "headline": benchmark.headline,
            "images_per_prompt": benchmark.images_per_prompt,
            "beside": list(benchmark.beside),
            "macro": benchmark.macro,
            "prompts_sha256": {
                split: provenance.prompts_sha256(prompts) for split, prompts in benchmark.splits.items()
            },
            "published": None if benchmark.published is None else benchmark.published.record(),
        },
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": provenance.command(),
        "judge": scorer_record(benchmark.scorer),
        "models": {item.role: dict(item.record) for item in candidates},
        "settings": {item.role: dict(item.settings) for item in candidates},
        "config": dict(config),
        "trained_with": trained_with,
        "versions": provenance.versions(),
        "git": code_record(source),
        "timing": {role: dict(spent) for role, spent in timing.items()},
        "scores": scores,
        "images": [_image_line(item, candidates[-1].folder) for item in judged],
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write results.json, whole or not at all. Numbers that do not exist are null, never NaN."""
    path = folder / RESULTS
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode())
    return path


def print_published(
    scores: Mapping[str, Tables], benchmark: Benchmark, template: str | None, console: Console
) -> None:
    """Ours beside what papers print, task by task, with the source and the template that ours were drawn with."""
    if benchmark.published is None:
        return
    ours = f"ours with the template {template}" if template else "ours of images made elsewhere"
    for split, parts in scores.items():
        table = benchmark.published.beside(parts[benchmark.headline])
        shown = Table(
            title=Text(f"{split}: {ours}, and {benchmark.published.source}"), title_justify="left", box=None
        )
        for number, heading in enumerate(table[0]):
            shown.add_column(heading, justify="right" if number else "left")
        for row in table[1:]:
            shown.add_row(*row)
        console.print(shown, "")


def print_scores(scores: Mapping[str, Tables], headline: str, confidence: float, console: Console) -> None:
    """A table a split that fits into 80 columns: a row a task, and base, tuned and their difference."""
    for split, parts in scores.items():
        rows = parts[headline]
        columns = list(next(iter(rows.values())))
        table = Table(
            title=Text(f"{split}: {headline} [{confidence:.0%} interval over prompts]"),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
        )
        table.add_column("task")
        for column in columns:
            table.add_column(column, justify="right")
        for task, row in rows.items():
            cells = [interval_text(row[column], signed=column == "difference") for column in columns]
            table.add_row(task, *(Text(cell) for cell in cells), style="bold" if task == OVERALL else "")
        console.print(table, "")


def interval_text(row: Mapping[str, Any], signed: bool) -> str:
    """`0.512 [0.43, 0.59]`; a difference has signs, and bounds with a third digit, since they are compared with zero.

    There are no bounds where there is no interval.
    """
    mean, bound = ("+.3f", "+.3f") if signed else (".3f", ".2f")
    if row["low"] is None:
        return f"{row['mean']:{mean}}"
    return f"{row['mean']:{mean}} [{row['low']:{bound}}, {row['high']:{bound}}]"


def _image_line(item: Judged, folder: Path) -> dict[str, Any]:
    return {
        "model": item.role,
        "split": item.split,
        "file": Path(os.path.relpath(item.file, folder)).as_posix(),
        "prompt": item.prompt,
        "prompt_id": item.prompt_id,
        "index": item.index,
        "sample": item.sample,
        "task": item.task,
        "rows": list(item.rows),
        "parts": dict(item.verdict.parts),
        "reason": item.verdict.reason,
        **({} if item.plan is None else {"plan": item.plan}),
    }
