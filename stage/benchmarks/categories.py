"""The rows of a benchmark's table that a prompt counts in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stage.types import Prompt

ALL = "all"  # the row of prompts that say nothing of themselves


@dataclass(frozen=True)
class Key:
    """A key of the prompt's metadata, such as GenEval's `tag` or DrawBench's `Category`; `all` where it has none."""

    key: str

    def __call__(self, prompt: Prompt) -> Sequence[str]:
        return (str(prompt.metadata.get(self.key, ALL)),)


@dataclass(frozen=True)
class QuotedText:
    """How long the text is that a prompt puts in double quotes, in letters without spaces and in words.

    A prompt counts in two rows, `6 to 10 letters` and `2 to 3 words`, and in a third where its line has a `level`.

    Args:
        text: gives the quoted text of a prompt, as the scorer reads it.
        letters, words: the last number of each bucket, rising; a last bucket takes what is longer.
    """

    text: Callable[[str], str]
    letters: Sequence[int]
    words: Sequence[int]

    def __post_init__(self) -> None:
        for edges in (self.letters, self.words):
            if not edges or list(edges) != sorted(set(edges)) or edges[0] < 1:
                raise ValueError(f"buckets end at rising positive numbers, got {list(edges)}; write [5, 10]")

    def __call__(self, prompt: Prompt) -> Sequence[str]:
        text = self.text(prompt.text)
        level = prompt.metadata.get("level")
        return (
            _bucket(len(text.replace(" ", "")), self.letters, "letters"),
            _bucket(len(text.split()), self.words, "words"),
            *(() if level is None else (f"level {level}",)),
        )


def _bucket(number: int, edges: Sequence[int], unit: str) -> str:
    """`1 to 5 letters` for a number in the first of the buckets that end at `edges`."""
    low = 1
    for edge in edges:
        if number <= edge:
            return (
                f"{low} to {edge} {unit}"
                if low < edge
                else f"{low} {unit.removesuffix('s') if low == 1 else unit}"
            )
        low = edge + 1
    return f"{low} or more {unit}"
