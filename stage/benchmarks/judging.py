"""Stage two of an evaluation: verdicts on the images that lie on disk, by any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console

from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.evaluation import Candidate, Judged, judged_image, progress
from stage.benchmarks.images import Images, Planned, sound
from stage.benchmarks.share import WHOLE, Share
from stage.benchmarks.verdicts import Verdicts, scoring_identity


class Judging:
    """The images of one model before one scorer.

    Args:
        folders: by split.
        settings: of the scorer, plain values; verdicts that were given under others do not count.
    """

    def __init__(
        self, candidate: Candidate, folders: Mapping[str, Images], benchmark: Benchmark, settings: Any = None
    ) -> None:
        self.candidate, self.folders, self.benchmark = candidate, folders, benchmark
        checkpoint = str(candidate.settings["checkpoint"])
        self.verdicts = {
            split: Verdicts(
                candidate.folder / split, scoring_identity(benchmark, split, checkpoint, settings)
            )
            for split in folders
        }

    def score(self, *, batch_size: int, console: Console, share: Share = WHOLE) -> int:
        """Judge what has no verdict yet of the share's images; returns how many were judged.

        Raises ValueError, with counts and before the first verdict, where images are missing or damaged.
        """
        step = max(1, batch_size // self.benchmark.images_per_prompt)
        found = {split: self._hashes(split, share) for split in self.folders}
        left = {
            split: [
                index for index, images in rows.items() if self.verdicts[split].load(index, images) is None
            ]
            for split, rows in found.items()
        }
        group = self.benchmark.images_per_prompt
        total, open_ = (group * sum(len(rows) for rows in several.values()) for several in (found, left))
        if not open_:
            console.print(f"{self.candidate.role}: all {total} images are judged already")
            return 0
        with progress(f"{self.candidate.role}: scoring", total, total - open_, console) as advance:
            for split, indices in left.items():
                for start in range(0, len(indices), step):
                    rows = indices[start : start + step]
                    self._judge(split, rows, found[split])
                    advance(group * len(rows))
        return open_

    def forget(self) -> None:
        """Delete the verdicts that this scorer has given, those of other settings or versions stay."""
        for verdicts in self.verdicts.values():
            verdicts.forget()

    def missing(self) -> int:
        """Images of all shares whose prompt has no verdicts yet."""
        group = self.benchmark.images_per_prompt
        return group * sum(
            not self.verdicts[split].has(index)
            for split in self.folders
            for index in range(len(self.benchmark.prompts(split)))
        )

    def collect(self) -> list[Judged]:
        """All verdicts in the order of the manifests.

        Raises ValueError where one is missing, or of an image that has changed since; says how many.
        """
        lines, stale = [], 0
        for split, folder in self.folders.items():
            items = self._items(split)
            for index, images in self._hashes(split, WHOLE).items():
                verdicts = self.verdicts[split].load(index, images)
                stale += verdicts is None
                lines += [
                    judged_image(self.candidate, split, folder, item, self.benchmark, verdict)
                    for item, verdict in zip(items[index], verdicts or (), strict=verdicts is not None)
                ]
        if stale:
            raise ValueError(
                f"every image must be judged as it lies on disk, those of {stale} prompts of {self.candidate.role} in "
                f"{self.candidate.folder} have changed or are not judged; give the same command again"
            )
        return lines

    def _judge(self, split: str, rows: list[int], hashes: Mapping[int, list[str]]) -> None:
        folder, items = self.folders[split], self._items(split)
        prompts = [self.benchmark.prompts(split)[index] for index in rows]
        pixels = torch.from_numpy(np.stack([folder.load(item) for index in rows for item in items[index]]))
        verdicts = self.benchmark.judge(pixels.unflatten(0, (len(rows), -1)), prompts)
        for index, found in zip(rows, verdicts, strict=True):
            self.verdicts[split].save(index, hashes[index], found)

    def _items(self, split: str) -> dict[int, list[Planned]]:
        found: dict[int, list[Planned]] = {}
        for item in self.folders[split].planned:
            found.setdefault(item.index, []).append(item)
        return found

    def _hashes(self, split: str, share: Share) -> dict[int, list[str]]:
        """sha256 of the images of each line of the share, in order; raises what `sound` raises."""
        mine = set(share.of_prompts(self.benchmark.prompts(split)))
        items = {index: group for index, group in self._items(split).items() if index in mine}
        found = sound(self.folders[split], [item for group in items.values() for item in group])
        return {index: [found[item.file] for item in group] for index, group in items.items()}
