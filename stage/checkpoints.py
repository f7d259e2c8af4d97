"""Checkpoints of a run: when they are written, and that they are written whole.

What is in them is said in `stage.training_checkpoint`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from stage.checkpoint_folder import CheckpointFolder
from stage.loggers import best_by
from stage.ranks import known
from stage.training_checkpoint import read_training_checkpoint, trained_names
from stage.whole_files import save


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


class Writing(Thread):
    """A checkpoint that is being written. A process that ends takes it along, and then it has no name yet."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the end, and raise what went wrong."""
        self.join()
        if self._error is not None:
            raise self._error


class Checkpoints(Checkpoint):
    """Keeps the last checkpoints, the newest as `last.ckpt`, and `best.ckpt`, which had the highest validation score.

    Lightning's ModelCheckpoint counts optimizer steps. What is left of it here is its place: Lightning calls
    checkpoint callbacks after all others, so a validation of the same update is known.

    Args:
        folder: where they go.
        every: updates between saves; it is also saved after the last update, after a validation that is the best, on a
            clean stop, and when an update fails before it has moved a weight, as with a reward service that is gone.
        keep: how many of the last checkpoints stay; more than one are also there as `update_N.ckpt`.
        beside_training: copy what is saved to CPU memory, and let a thread write it while training goes on. The next
            save, and the end of training, wait for it and raise its error.
        monitor: metric of best.ckpt, higher is better; see `stage.loggers.best_by`.

    Raises ValueError for numbers below 1.
    """

    def __init__(self, *, folder: str, every: int, keep: int, beside_training: bool, monitor: str) -> None:
        for name, value, unit in (("every", every, "update"), ("keep", keep, "checkpoint")):
            if value < 1:
                raise ValueError(
                    f"callbacks.checkpoints.{name} must be at least 1 {unit}; got {value}. Raise it."
                )
        self.folder, self.every, self.keep, self.monitor = Path(folder), every, keep, monitor
        self.beside_training = beside_training
        self.best_score: float | None = None
        self.saved_update = -1
        self._writing: Writing | None = None

    @property
    def held(self) -> CheckpointFolder:
        """What is in the folder."""
        return CheckpointFolder(self.folder, self.keep)

    @property
    def last(self) -> Path:
        return self.held.last

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Raise before any work, in all processes, when the folder cannot take the checkpoints."""
        with pl_module.ranks.together():
            self._check_copies(trainer)
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        with pl_module.ranks.together():
            if trainer.is_global_zero:
                self.held.prepare()
                self._check_room(pl_module)

    def _check_copies(self, trainer: Trainer) -> None:
        if self.beside_training and not getattr(trainer.strategy, "in_parts", True):
            raise ValueError(
                "a whole checkpoint of slices fills the CPU memory of one process, and is not copied once more; got "
                "callbacks.checkpoints.beside_training=true. Set trainer.strategy.checkpoint=sharded."
            )

    def _check_room(self, pl_module: Any) -> None:
        missing, folder = self.held.most - self.held.count(), self.folder
        needed, free = max(1, missing) * checkpoint_bytes(pl_module), shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(
                f"checkpoints need {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free; make room, keep fewer "
                "(callbacks.checkpoints.keep), or set output=FOLDER on another disk"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        score = best_by(pl_module.latest, self.monitor)
        improved = score is not None and (self.best_score is None or score > self.best_score)
        if improved:
            self.best_score = score
        # The last update asks to stop, too.
        if improved or pl_module.update % self.every == 0 or trainer.should_stop:
            self.save(trainer, pl_module, best=improved)

    def save(self, trainer: Trainer, pl_module: Any, *, best: bool) -> None:
        """Write a checkpoint, with the state of the optimizer; a full disk is an error of all processes."""
        self.finish(pl_module)
        # What Trainer.save_checkpoint does, but for its barrier, in which the others would wait for one that failed.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        update = pl_module.update
        place = Path(pl_module.ranks.gathered(str(self.held.place(update)))[0])
        if self.beside_training:
            writes = trainer.is_global_zero or getattr(trainer.strategy, "in_parts", False)
            content = copied(checkpoint) if writes else {}
            self._writing = Writing(partial(self._write, trainer, content, place, update, best))
        else:
            with pl_module.ranks.together():
                self._write(trainer, checkpoint, place, update, best)
        self.saved_update = update

    def _write(
        self, trainer: Trainer, checkpoint: dict[str, Any], place: Path, update: int, best: bool
    ) -> None:
        trainer.strategy.save_checkpoint(checkpoint, place)
        if trainer.is_global_zero:
            self.held.settle(place, update, best=best)

    def finish(self, pl_module: Any) -> None:
        """Wait until the checkpoint that is being written has its name, and raise what went wrong, in all processes."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with pl_module.ranks.together():
                writing.finish()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A stop asked for between two updates comes after the last chance to save."""
        if self.saved_update != pl_module.update:
            self.save(trainer, pl_module, best=False)
        self.finish(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the updates that were done before an error; resuming repeats the one that failed, bit for bit.

        A second Ctrl-C saves nothing, since it asks to leave now. Of several processes the others may not know of the
        error and would be waited for: then last.ckpt stays what it was.
        """
        if not isinstance(exception, Exception) or not (trainer.world_size == 1 or known(exception)):
            return
        try:
            self.finish(pl_module)
            if pl_module.update > 0 and pl_module.update != self.saved_update and pl_module.whole:
                self.save(trainer, pl_module, best=False)
                self.finish(pl_module)
        except (
            OSError,
            ValueError,
        ) as error:  # the first reason stays the first, and training ends in good order
            exception.add_note(f"what was done before could not be saved: {error}")

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint of this moment, its tensors and slices in CPU memory."""
    stager = DefaultStager(StagingOptions(False, False, False, False))  # torch 2.11 can use each once
    found: Any = stager.stage(checkpoint)
    stager.close()
    return dict(found)


def checkpoint_bytes(module: Any) -> int:
    """Size of one checkpoint: what is trained, and what the optimizer keeps of it."""
    state = module.policy.state_dict()
    trained = sum(state[name].numel() * state[name].element_size() for name in trained_names(module.policy))
    return trained + module.optimizer_bytes()
