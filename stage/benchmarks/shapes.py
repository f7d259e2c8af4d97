"""The benchmark of the embedded world, added up as GenEval: rows are its tags, overall is the mean of the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.categories import Key
from stage.types import Prompt, Scorer


class ShapesBenchmark(Benchmark):
    """Prompts in GenEval's schema; the arguments are those of `Benchmark`.

    Images and results of the one called shapes lie directly in the folder of the evaluated model; one of your own has
    a folder in it, as other benchmarks do, so that neither overwrites the other's results.
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
        """None of its own for shapes itself."""
        return "" if self.name == "shapes" else super().subfolder
