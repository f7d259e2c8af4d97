"""What a pack consists of, and what is left to do of it, read from the folders of its runs.

Nothing is remembered beside what lies there: `last.ckpt` says how far a training came, and `packed.json` which
overrides it had and what was evaluated.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage.training_checkpoint import read_training_checkpoint
from stage.whole_files import atomic_write

RECORD, LAST = "packed.json", Path("checkpoints") / "last.ckpt"


@dataclass(frozen=True)
class PackedRun:
    """One run: `overrides` of train.py without seed, updates and folder; `evaluation` those of evaluate.py, or None."""

    variant: str
    seed: int
    folder: Path
    updates: int
    overrides: tuple[str, ...]
    evaluation: tuple[str, ...] | None

    @property
    def name(self) -> str:
        return f"{self.variant}/seed_{self.seed}"


@dataclass(frozen=True)
class Step:
    """One process: `kind` train, resume or evaluate, and its command line."""

    kind: str
    command: tuple[str, ...]


def plan(config: Any, root: Path) -> list[PackedRun]:
    """Every variant with every seed, seed by seed; `root` is the folder that relative paths start from.

    Raises ValueError for a variant that is not there, a seed twice, and numbers that no pack can have.
    """
    variants: Mapping[str, Sequence[str]] = config.variants
    chosen = list(variants) if config.only is None else list(config.only)
    unknown = [name for name in chosen if name not in variants]
    if unknown:
        raise ValueError(f"only names variants; {unknown[0]} is none of {', '.join(variants)}")
    for name, values in (("only", chosen), ("seeds", list(config.seeds))):
        if len(set(values)) != len(values) or not values:
            raise ValueError(f"{name} must name at least one, and each once; got {values}")
    for name in ("updates", "processes", "threads"):
        value = config[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    train, evaluation = _device(str(config.device))
    more = None if config.evaluate is None else (*evaluation, *config.evaluate)
    return [
        PackedRun(
            variant=name,
            seed=seed,
            folder=root / str(config.output) / name / f"seed_{seed}",
            updates=config.updates,
            overrides=(*variants[name], *train, *config.train),
            evaluation=more,
        )
        for seed in config.seeds
        for name in chosen
    ]


def _device(name: str) -> tuple[list[str], list[str]]:
    """The overrides of train.py and of evaluate.py that put everything on one device."""
    if name == "auto":
        return [], []
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda; got {name!r}")
    detector = f"reward.detector.device={name}"
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[name]
    return [f"trainer.accelerator={accelerator}", detector], [f"device={name}", detector]


def check_folders(runs: Sequence[PackedRun]) -> None:
    """Raise ValueError for a folder that holds a run of other overrides, before anything is started."""
    for run in runs:
        before = read_record(run.folder).get("overrides")
        if before is not None and tuple(before) != run.overrides:
            raise ValueError(
                f"{run.folder} holds a run of other settings, {' '.join(before)}, and not {' '.join(run.overrides)}; "
                "remove it, or give another folder with output=FOLDER"
            )


def next_step(run: PackedRun, programs: Path) -> Step | None:
    """What to do next for a run, None when it is done. `programs` is the folder of train.py and evaluate.py."""
    last, record = run.folder / LAST, read_record(run.folder)
    if record.get("evaluated") == _evaluated(run):
        return None
    done = read_training_checkpoint(last)["update"] if last.exists() else 0
    python = (sys.executable, "-u")
    if done < run.updates:
        same = f"updates={run.updates}"
        if done:
            return Step("resume", (*python, str(programs / "train.py"), f"resume={last}", same))
        fresh = (*run.overrides, f"seed={run.seed}", same, f"output={run.folder}")
        return Step("train", (*python, str(programs / "train.py"), *fresh))
    if run.evaluation is None:
        return None
    command = (*python, str(programs / "evaluate.py"), f"checkpoint={last}", *run.evaluation)
    return Step("evaluate", command)


def read_record(folder: Path) -> dict[str, Any]:
    """packed.json of a run, empty where there is none. Raises ValueError for a damaged one."""
    file = folder / RECORD
    if not file.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove it, and the run is done again") from error
    return record


def begin(run: PackedRun, step: Step) -> None:
    """Record what is about to run, so that a later pack can tell whether the folder is one of its own."""
    _write_record(run.folder, {**read_record(run.folder), "overrides": list(run.overrides)})


def finish(run: PackedRun, step: Step, seconds: float) -> None:
    """Record a step that ended well, and its seconds of wall time, which add up over resumes."""
    record = read_record(run.folder)
    kind = "evaluate" if step.kind == "evaluate" else "train"
    spent = {**record.get("seconds", {})}
    spent[kind] = round(spent.get(kind, 0.0) + seconds, 1)
    evaluated = {"evaluated": _evaluated(run)} if kind == "evaluate" else {}
    _write_record(run.folder, {**record, "seconds": spent, **evaluated})


def updates_done(folder: Path) -> int:
    """The last update in metrics.csv, 0 without one: for progress, since it is cheaper than a checkpoint."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return 0
    cell = file.read_bytes().rstrip().rpartition(b"\n")[2].partition(b",")[0]
    return int(cell) if cell.isdigit() else 0


def _evaluated(run: PackedRun) -> dict[str, Any] | None:
    if run.evaluation is None:
        return {"updates": run.updates, "overrides": None}
    return {"updates": run.updates, "overrides": list(run.evaluation)}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
