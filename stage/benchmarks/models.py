"""What a benchmark is asked that looks at the models themselves, and not only at their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from rich.console import Console

from stage.benchmarks.evaluation import Candidate, Judged
from stage.benchmarks.images import Images
from stage.policy.sampler import Sampler


@runtime_checkable
class JudgesModels(Protocol):
    """A benchmark that judges models; each of them is read by `Candidate.load`, one at a time."""

    def judge_models(
        self,
        candidates: Sequence[Candidate],
        folders: Mapping[str, Mapping[str, Images]],
        splits: Sequence[str],
        sampler: Sampler,
        batch_size: int,
        console: Console,
    ) -> list[Judged]:
        """A line for each prompt, sample and role; `folders` by role and split."""
