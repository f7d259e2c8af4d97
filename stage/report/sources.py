"""Where runs come from: run folders, offline runs of Weights & Biases, and its server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stage.report.read import METRICS, RESULTS, Run, curves_of, first_not_finite, read_run
from stage.report.wandb_log import STEP, WandbRun, read_wandb_file

ONLINE = "wandb:"
ADDED = ("reward_record", "code")  # what the logger keeps in the configuration of wandb beside ours
GRID = "images/grid/filenames"


def read_sources(sources: Iterable[str]) -> tuple[list[Run], list[str]]:
    """The runs that the sources name, each with a name that no other of them has, and in words those that had one name.

    A source is a run folder; a folder `offline-run-*` of wandb, the file in it, or a folder `wandb` of several;
    `wandb:ENTITY/PROJECT/ID`; or `wandb:ENTITY/PROJECT` for all runs of a project. A run folder is named by itself and
    the folder around it, a run of wandb by its name there.

    Raises FileNotFoundError for a source without a run, ValueError for a damaged one or without a login.
    """
    runs = [run for source in sources for run in _read(source)]
    names = [_tail(run, 2) if _local(run) else run.name for run in runs]
    clashes = [
        f"{names.count(name)} runs are called {name}: "
        + ", ".join(str(run.folder) for run, its in zip(runs, names, strict=True) if its == name)
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    short = [run.name for run in runs]
    shown = [
        own if short.count(own) == 1 else name if names.count(name) == 1 else _tail(run, 4)
        for run, own, name in zip(runs, short, names, strict=True)
    ]
    return [replace(run, name=name) for run, name in zip(runs, shown, strict=True)], clashes


def _local(run: Run) -> bool:
    return (run.folder / METRICS).is_file() or run.evaluation is not None


def _tail(run: Run, depth: int) -> str:
    """The last parts of a run's folder."""
    return "/".join(run.folder.absolute().parts[-depth:])


def _read(source: str) -> list[Run]:
    if source.startswith(ONLINE):
        return _online(source.removeprefix(ONLINE))
    path = Path(source)
    if path.suffix == ".wandb":
        return [offline_run(path)]
    if path.is_dir() and not any((path / name).is_file() for name in (METRICS, RESULTS)):
        files = sorted(path.glob("*.wandb")) or sorted(path.glob("offline-run-*/*.wandb"))
        if files:
            return [offline_run(file) for file in files]
    return [read_run(path)]


def offline_run(file: Path) -> Run:
    """The run in `run-ID.wandb`; its pictures lie beside the file, and evaluations are not among it."""
    found = read_wandb_file(file)
    grids = {
        int(row[STEP]): file.parent / "files" / names[0]
        for row in found.history
        if (names := row.get(GRID)) and STEP in row
    }
    return _run(found, file.parent, grids)


def _online(path: str) -> list[Run]:
    """Runs of wandb's server, or of the one that WANDB_BASE_URL names."""
    import wandb

    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(
            f"an online run is {ONLINE}ENTITY/PROJECT/ID, without ID all of a project; got {path!r}"
        )
    try:
        api = wandb.Api()
        found = [api.run(path)] if len(parts) == 3 else list(api.runs(path))
        return [
            _run(
                WandbRun(str(item.name), str(item.id), _plain(item.config), list(item.scan_history())),
                Path(item.url),
                {},
            )
            for item in found
        ]
    except (wandb.errors.Error, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"wandb could not read {path} ({reason}); log in with `wandb login`, or give folders of offline runs"
        ) from error


def _run(found: WandbRun, folder: Path, grids: Mapping[int, Path]) -> Run:
    cells: dict[str, dict[int, float]] = {}
    for row in found.history:
        if isinstance(row.get(STEP), int | float):
            for name, value in row.items():
                if (number := _number(value)) is not None and name != STEP and not name.startswith("_"):
                    cells.setdefault(name, {})[int(row[STEP])] = number
    code = found.config.get("code")
    return Run(
        folder=folder,
        name=found.name or found.run_id,
        config={name: value for name, value in found.config.items() if name not in ADDED},
        curves=curves_of(cells),
        grids=grids,
        evaluation=None,
        code=[] if code is None else [{"since": 0, **code}],
        not_finite=first_not_finite(cells),
    )


def _number(value: Any) -> float | None:
    """A logged value as a number; wandb writes what is not finite as a word. None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return words.get(value) if isinstance(value, str) else None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}
