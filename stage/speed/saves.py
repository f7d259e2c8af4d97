"""How long training waits for checkpoints, and what they take of the device."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer

from stage.checkpoints import Checkpoints, checkpoint_bytes


class Saves(Checkpoints):
    """A checkpoint after each update: how long training waits for it, and what it takes of the device."""

    def __init__(self, folder: Path, beside: bool) -> None:
        super().__init__(folder=str(folder), every=1, keep=1, beside_training=beside, monitor="none")
        self.waited: list[float] = []
        self.peak, self.bytes = 0, 0

    def save(self, trainer: Trainer, pl_module: Any, *, best: bool) -> None:
        cuda, begun = pl_module.device.type == "cuda", time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        super().save(trainer, pl_module, best=best)
        self.waited.append(time.perf_counter() - begun)
        self.bytes = checkpoint_bytes(pl_module)
        if cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(pl_module.device))
        if trainer.is_global_zero:
            size, waited = self.bytes / 1e9, self.waited[-1]
            print(
                f"  saved {size:.1f} GB, training waited {waited:.2f} s, peak {self.peak / 2**30:.2f} GiB",
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        begun = time.perf_counter()
        super().on_train_end(trainer, pl_module)
        self.waited[-1] += time.perf_counter() - begun

    def summary(self) -> dict[str, Any]:
        """Seconds that training waited for a save: their median, and each, the last to its end."""
        return {
            "save_seconds": median(self.waited),
            "saves_seconds": self.waited,
            "save_gib": self.bytes / 2**30,
            "save_peak_gib": self.peak / 2**30,
        }
