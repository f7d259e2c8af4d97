"""The benchmark of the embedded world, added up as GenEval: rows are its tags, overall is the mean of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.categories import Key
from stage.types import Prompt, Scorer


class ShapesBenchmark(Benchmark):
    """Prompts in GenEval's schema; the arguments are those of `Benchmark`.

    Its images and results lie directly in the folder of the evaluated model.
    """

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Prompt]],
        images_per_prompt: int,
        scorer: Scorer | None,
        headline: str,
        beside: Sequence[str],
    ) -> None:
        super().__init__(
            name=name,
            splits=splits,
            images_per_prompt=images_per_prompt,
            scorer=scorer,
            headline=headline,
            beside=beside,
            rows=Key("tag"),
            macro=True,
            win_rate=False,
            published=None,
        )

    @property
    def subfolder(self) -> str:
        """None of its own."""
        return ""
