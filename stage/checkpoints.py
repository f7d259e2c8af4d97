"""Checkpoints of a run: when they are written, and that they are written whole.

What is in them is said in `stage.training_checkpoint`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from stage.training_checkpoint import read_training_checkpoint, save, trained_names

COPIES = 3  # checkpoints that exist at once: last, best, and the one being written


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file beside its place and renames it (conf/trainer, `plugins`).

    Lightning's own writer holds the whole file in memory, writes it into the system's temporary folder, which may
    be another disk, and copies it from there: a kill in the middle leaves half a checkpoint.
    """

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, mapped from the file: of several processes each reads what it needs."""
        return read_training_checkpoint(Path(path))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save(checkpoint, Path(path))


class Checkpoints(Checkpoint):
    """Keeps `last.ckpt`, from which a run resumes, and `best.ckpt`, which had the highest validation score.

    Lightning's ModelCheckpoint counts optimizer steps. What is left of it here is its place: Lightning calls
    checkpoint callbacks after all others, so a validation of the same update is known.

    Args:
        folder: where the two files go.
        every: updates between saves of last.ckpt; it is also saved after the last update, on a clean stop, and when
            an update fails before it has moved a weight, as with a reward service that is gone.
        monitor: metric of best.ckpt, higher is better.
    """

    def __init__(self, *, folder: str, every: int, monitor: str) -> None:
        if every < 1:
            raise ValueError(f"callbacks.checkpoints.every must be at least 1 update; got {every}. Raise it.")
        self.folder, self.every, self.monitor = Path(folder), every, monitor
        self.best_score: float | None = None
        self.saved_update = -1

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Raise before any work, in all processes, when the folder cannot take the checkpoints."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        with pl_module.ranks.together():
            if trainer.is_global_zero:
                self._check_room(pl_module)

    def _check_room(self, pl_module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.ckpt.*"):  # half written when a run was killed
            left.unlink()
        missing = COPIES - len(list(self.folder.glob("*.ckpt")))
        needed, free = max(1, missing) * checkpoint_bytes(pl_module), shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"checkpoints need {needed / 1e6:.0f} MB, {self.folder} has {free / 1e6:.0f} MB free; "
                "make room, or set output=FOLDER on another disk"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        score = pl_module.latest.get(self.monitor)
        improved = score is not None and (self.best_score is None or score > self.best_score)
        if improved:
            self.best_score = score
            self.save(trainer, pl_module, self.folder / "best.ckpt")
        if pl_module.update % self.every == 0 or trainer.should_stop:  # the last update asks to stop, too
            self.save(trainer, pl_module, self.last)
            self.saved_update = pl_module.update

    def save(self, trainer: Trainer, pl_module: Any, path: Path) -> None:
        """Write a checkpoint, with the state of the optimizer; a full disk is an error of all processes."""
        # What Trainer.save_checkpoint does, but for its barrier, in which the others would wait for one that failed.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        with pl_module.ranks.together():
            trainer.strategy.save_checkpoint(checkpoint, path)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A stop asked for between two updates comes after the last chance to save."""
        if self.saved_update != pl_module.update:
            self.save(trainer, pl_module, self.last)
            self.saved_update = pl_module.update

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the updates that were done before an error; resuming repeats the one that failed, bit for bit.

        A second Ctrl-C saves nothing, since it asks to leave now. Of several processes the others may not know of the
        error and would be waited for: then last.ckpt stays what it was.
        """
        known = trainer.world_size == 1 or getattr(exception, "on_all_ranks", False)
        unsaved = pl_module.update > 0 and pl_module.update != self.saved_update
        if unsaved and pl_module.whole and isinstance(exception, Exception) and known:
            self.save(trainer, pl_module, self.last)
            self.saved_update = pl_module.update

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


def checkpoint_bytes(module: Any) -> int:
    """Size of one checkpoint: what is trained, and what the optimizer keeps of it."""
    state = module.policy.state_dict()
    trained = sum(state[name].numel() * state[name].element_size() for name in trained_names(module.policy))
    return trained + module.optimizer_bytes()
