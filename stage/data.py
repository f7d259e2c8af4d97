"""The order in which training reads its prompts, and prompts of a run as a Lightning data module.

Which prompts an update sees is a pure function of (seed, update). Nothing is counted inside a data loader, so
a run that is resumed in the middle of an epoch goes on exactly where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from stage.prompt_files import prompt_id, read_prompts
from stage.types import Prompt

__all__ = ["PromptStream", "UpdateData", "UpdateNumbers", "prompt_id", "read_prompts"]


class PromptStream:
    """The prompts of every update, for all ranks together.

    Epoch e reads the prompts in a permutation of its own, drawn from Philox with the key (seed, e), and has
    `len(prompts) // prompts_per_update` updates. What is left over is not read in that epoch, so no update
    holds a prompt twice and no epoch runs into the next.

    Args:
        prompts: the prompts of the file, at least `prompts_per_update`.
        prompts_per_update: P summed over the ranks.
        seed: in [0, 2**64).
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_update: int, seed: int) -> None:
        if prompts_per_update < 1:
            raise ValueError(f"prompts_per_update is a positive integer, got {prompts_per_update}; raise it")
        if len(prompts) < prompts_per_update:
            raise ValueError(
                f"an update holds no prompt twice, so it needs at least prompts_per_update = "
                f"{prompts_per_update} prompts, got {len(prompts)}; lower prompts_per_update or give more "
                f"prompts"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is an integer in [0, 2**64), got {seed}; choose another")
        self.prompts = tuple(prompts)
        self.prompts_per_update = prompts_per_update
        self.seed = seed
        self.updates_per_epoch = len(self.prompts) // prompts_per_update

    def order(self, epoch: int, stream: int = 0) -> np.ndarray:
        """Positions in `prompts` in the order in which `epoch` reads them, int64 `[len(prompts)]`.

        Other streams are orders of their own, independent of the one that training reads, 0.

        Raw Philox output, sorted: NumPy keeps that stream forever, while `Generator.permutation` may change.
        """
        philox = np.random.Philox(key=np.array([self.seed, epoch + (stream << 32)], dtype=np.uint64))
        return np.argsort(philox.random_raw(len(self.prompts)), kind="stable")

    def batch(self, update: int) -> tuple[Prompt, ...]:
        """The `prompts_per_update` different prompts of `update`, counted from 0."""
        if update < 0:
            raise ValueError(
                f"updates are counted from 0, got {update}; pass the number of rollouts done so far"
            )
        return self._read(update, stream=0)

    def spare(self, update: int, number: int) -> tuple[Prompt, ...]:
        """As many prompts as a batch, in place of some of `update`; `number` counts the times it is asked, from 1.

        They may stand in the batch too. Raises ValueError for a number below 1.
        """
        if number < 1:
            raise ValueError(f"spare prompts are counted from 1, got {number}; 0 is the batch itself")
        return self._read(update, stream=number)

    def _read(self, update: int, stream: int) -> tuple[Prompt, ...]:
        epoch, step = divmod(update, self.updates_per_epoch)
        chosen = self.order(epoch, stream)[
            step * self.prompts_per_update : (step + 1) * self.prompts_per_update
        ]
        return tuple(self.prompts[position] for position in chosen)


class UpdateNumbers(IterableDataset[int]):
    """start, start + 1, ... without end; `start` is asked for when the iteration begins."""

    def __init__(self, start: Callable[[], int]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        update = self.start()
        while True:
            yield update
            update += 1


class UpdateData(LightningDataModule):
    """Training items are update numbers, validation and test items are tuples of prompts.

    The module turns a number into prompts with `stream.batch(update)`. Numbers begin at the module's own
    saved counter `update`, so that a resumed run continues; they never end, the module stops the trainer.
    Every rank gets every number and takes its share of the prompts.

    Args:
        train: prompt file that training reads, see `read_prompts`.
        validation: prompt file for validation while training; null for none.
        heldout: prompt file for the final evaluation, which shares no prompt with the other two; null for
            none.
        prompts_per_update: prompts in an update over all ranks; validation items are as long, the last may be
            shorter.
        seed: of the order of the training prompts.
    """

    def __init__(
        self,
        train: str,
        validation: str | None,
        heldout: str | None,
        prompts_per_update: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.stream = PromptStream(read_prompts(train), prompts_per_update, seed)
        self.validation = read_prompts(validation) if validation is not None else ()
        self.heldout = read_prompts(heldout) if heldout is not None else ()
        seen = {prompt.text for prompt in (*self.stream.prompts, *self.validation)}
        leaked = [prompt.text for prompt in self.heldout if prompt.text in seen]
        if leaked:
            raise ValueError(
                f"held-out prompts stand in no other list, {len(leaked)} of {heldout} do, the first is "
                f"{leaked[0]!r}; remove them from one of the files"
            )

    def by_name(self) -> dict[str, tuple[Prompt, ...]]:
        """The lists that a run draws images for, by the keys of the configuration."""
        return {"data.train": self.stream.prompts, "data.validation": self.validation}

    def train_dataloader(self) -> DataLoader[int]:
        """0, 1, ... or, attached to a trainer, the numbers from the module's `update` on."""
        return DataLoader(UpdateNumbers(self._start), batch_size=None)

    def val_dataloader(self) -> list[DataLoader[tuple[Prompt, ...]]]:
        """The validation prompts in tuples, in the order of the file."""
        return self._chunks(self.validation)

    def test_dataloader(self) -> list[DataLoader[tuple[Prompt, ...]]]:
        """The held-out prompts in tuples, in the order of the file."""
        return self._chunks(self.heldout)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Nothing to move: Lightning would take the frozen prompts apart in search of tensors."""
        return batch

    def _start(self) -> int:
        if self.trainer is None:
            return 0
        done = getattr(self.trainer.lightning_module, "update", None)
        if done is None:
            raise ValueError(
                f"training goes on from the module's saved counter `update`, "
                f"{type(self.trainer.lightning_module).__name__} has none; count finished rollouts in it"
            )
        return int(done)

    def _chunks(self, prompts: Sequence[Prompt]) -> list[DataLoader[tuple[Prompt, ...]]]:
        size = self.stream.prompts_per_update
        chunks = [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return [DataLoader(chunks, batch_size=None)] if chunks else []  # type: ignore[arg-type]
