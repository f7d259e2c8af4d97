"""Prompt files, the order in which training reads them, and both as a Lightning data module.

Which prompts an update sees is a pure function of (seed, update). Nothing is counted inside a data loader, so
a run that is resumed in the middle of an epoch goes on exactly where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from stage.paths import resolve
from stage.request import parse_request
from stage.types import Prompt


def prompt_id(text: str) -> int:
    """32-bit BLAKE2b of the text in UTF-8, in [0, 2**32); it depends on nothing but the text.

    Two texts may share an id (0.6 % of lists of 7,000 hold such a pair). They then share random numbers, and
    nothing else.
    """
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=4).digest(), "big")


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a JSONL file in GenEval's schema, in the order of the file.

    Args:
        path: an ordinary path, or `package://stage/shapes/assets/train.jsonl`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: `file:line: what is wrong; remedy` for the first line that cannot be read, is not scorable
            as written, or repeats the text of an earlier one. A file without lines is an error too.
    """
    file = resolve(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"a prompt file is a JSONL file, got {str(path)!r}, which is no file; check the path"
        )
    content = file.read_bytes()
    if not content.strip():
        raise ValueError(f"{file}:1: the file holds no prompt; write one JSON object a line")
    prompts: list[Prompt] = []
    first: dict[str, int] = {}
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            prompt = _read_line(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from error
        if prompt.text in first:
            raise ValueError(
                f"{file}:{number}: every prompt stands once, {prompt.text!r} is on line "
                f"{first[prompt.text]} already; remove one of them"
            )
        first[prompt.text] = number
        prompts.append(prompt)
    return tuple(prompts)


def _read_line(line: bytes) -> Prompt:
    """One line of a prompt file; ValueError says what is wrong with it."""
    if not line.strip():
        raise ValueError("the line is empty; remove it")
    try:
        record = json.loads(
            line.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the line is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg}, column {error.colno}); repair it") from error
    except RecursionError as error:
        raise ValueError("the line is nested too deeply to be read; write a flat object") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line holds one JSON object, got {type(record).__name__}; wrap it in braces")
    text = record.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompt must be a non-empty string, got {text!r}; write what the picture shows")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"prompt holds half of a surrogate pair, got {text!r}; write the whole character")
    parse_request(record)
    return Prompt(id=prompt_id(text), text=text, metadata=record)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys is written twice; Python would keep the last and drop the others."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"every key stands once in an object, {twice!r} stands twice; remove one of them")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}; write a number or leave the key out")


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

    def order(self, epoch: int) -> np.ndarray:
        """Positions in `prompts` in the order in which `epoch` reads them, int64 `[len(prompts)]`.

        Raw Philox output, sorted: NumPy keeps that stream forever, while `Generator.permutation` may change.
        """
        philox = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
        return np.argsort(philox.random_raw(len(self.prompts)), kind="stable")

    def batch(self, update: int) -> tuple[Prompt, ...]:
        """The `prompts_per_update` different prompts of `update`, counted from 0."""
        if update < 0:
            raise ValueError(
                f"updates are counted from 0, got {update}; pass the number of rollouts done so far"
            )
        epoch, step = divmod(update, self.updates_per_epoch)
        chosen = self.order(epoch)[step * self.prompts_per_update : (step + 1) * self.prompts_per_update]
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
