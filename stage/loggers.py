"""Where metrics go: always a CSV file in the run folder, and Weights & Biases when asked for.

The x-axis of both is the update, rollouts done so far. Row 0, if there is one, is the validation of the base
weights.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import OmegaConf

from stage.code_version import CODE, continued
from stage.whole_files import atomic_write

X = "update"
STRICT, REWARD = "validation/strict", "validation/reward"


class MetricsFile(Logger):
    """Rows of `metrics.csv`, on disk after every update, and `config.yaml` beside it.

    Lightning's CSVLogger deletes the file of a run that is resumed. This one keeps the rows before the first
    row it gets, so a run that was stopped or killed and resumed in its folder ends with one row an update.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self._columns: list[str] | None = None  # None until the first row

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(dict(params)), self.folder / "config.yaml")

    @rank_zero_only
    def write_reward(self, record: Mapping[str, Any]) -> None:
        """reward.json: the class of the scorer, and revision and sha256 of its weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / "reward.json") as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @rank_zero_only
    def write_code(self, record: Mapping[str, Any], update: int) -> None:
        """code.json: the versions of the program that the run was made by (`stage.code_version`), oldest first."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / CODE
        before = json.loads(file.read_text(encoding="utf-8")) if update and file.is_file() else []
        with atomic_write(file) as temporary:
            temporary.write_text(
                json.dumps(continued(before, record, update), indent=1) + "\n", encoding="utf-8"
            )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row. A column that was not there before is added to all rows."""
        row: dict[str, Any] = {**metrics, X: step}
        if self._columns is None:
            before = [old for old in read_metrics(self.path) if int(old[X]) < int(step or 0)]
            self._rewrite([*before, row])
        elif row.keys() - set(self._columns):
            self._rewrite([*read_metrics(self.path), row])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._columns = [X, *sorted({name for row in rows for name in row} - {X})]
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)


class UpdateLog(Callback):
    """Gives the loggers the row of an update, once the other callbacks have added theirs and before it is saved.

    A module brings it along (`configure_callbacks`), which puts it behind all callbacks but those that save. A kill
    between row and checkpoint then costs nothing: the row is written again when the update is done again. The other
    way round the row would be missing for ever.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with pl_module.ranks.together():  # the disk of the first process may be full
            for logger in trainer.loggers:
                logger.log_metrics(pl_module.latest, step=pl_module.update)
                logger.save()


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, without the empty cells; no rows when there is no file.

    A last line without its end, from a kill in the middle of writing it, is none.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(lines)]
    return [row for row in rows if X in row]


def best_by(row: Mapping[str, Any], monitor: str) -> Any | None:
    """What best.ckpt is chosen by, in a row of metrics: `monitor`, None where the row has no such value.

    A reward without a part `strict`, of preference for one, has no validation/strict: there it is validation/reward.
    """
    return row.get(monitor, row.get(REWARD) if monitor == STRICT else None)


def csv_only(folder: str) -> list[Logger]:
    """The file alone (conf/logger/csv.yaml)."""
    return [MetricsFile(folder)]


def csv_and_wandb(
    folder: str,
    project: str,
    name: str | None,
    mode: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
) -> list[Logger]:
    """The file and Weights & Biases (conf/logger/wandb.yaml).

    Args:
        folder: of the run; `wandb/` is made in it.
        project, entity, group, tags: as in `wandb.init`.
        name: of the run on the page; None takes the name of the folder.
        mode: online, or offline, which needs neither network nor account; `wandb sync` uploads it later.

    The run's id follows from the folder, so a resumed run goes on in the same curves.

    Raises ValueError for another mode, and when wandb cannot start a run.
    """
    if mode not in ("online", "offline"):
        raise ValueError(
            f"logger.mode must be online or offline; got {mode!r}. Without an account take offline."
        )
    identity = hashlib.blake2b(str(Path(folder).resolve()).encode(), digest_size=8).hexdigest()
    Path(folder).mkdir(parents=True, exist_ok=True)
    logger = WandbLogger(
        name=name or Path(folder).resolve().name,
        save_dir=folder,
        project=project,
        id=identity,
        entity=entity,
        group=group,
        tags=list(tags),
        mode=mode,
    )
    import wandb  # here, since only this logger needs it and it takes a second

    try:
        _ = logger.experiment  # starts the run, so that a missing login shows before the model is loaded
    except wandb.errors.Error as error:
        raise ValueError(
            f"wandb could not start a run ({error}). Log in with `wandb login`, or set logger.mode=offline."
        ) from error
    return [MetricsFile(folder), logger]


def log_reward(loggers: Sequence[Any], record: Mapping[str, Any]) -> None:
    """Keep what the reward is made of (`stage.provenance.scorer_record`): reward.json beside config.yaml, and wandb."""
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            logger.write_reward(record)
        elif isinstance(logger, WandbLogger):
            logger.log_hyperparams({"reward_record": dict(record)})


def log_code(loggers: Sequence[Any], record: Mapping[str, Any], update: int) -> None:
    """Keep which code makes the run from `update` on: code.json beside config.yaml, and wandb."""
    for logger in loggers:
        if isinstance(logger, MetricsFile):
            logger.write_code(record, update)
        elif isinstance(logger, WandbLogger):
            logger.log_hyperparams({"code": dict(record)})


def log_image(loggers: Sequence[Any], name: str, file: Path, caption: str, update: int) -> None:
    """Show an image file in the loggers that can show images."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)], step=update, caption=[caption])


def log_table(
    loggers: Sequence[Any], name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], update: int
) -> None:
    """Show rows of text and numbers in the loggers that can show tables."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_text(name, list(columns), [list(row) for row in rows], step=update)


def finish_wandb() -> None:
    """End the wandb run of this process, if there is one, so that the next job of a sweep gets its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
