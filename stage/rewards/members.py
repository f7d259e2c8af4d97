"""What scorers made of other scorers ask each of them, by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stage.provenance import weights_of
from stage.types import ChecksItself, ChecksPrompts, ComparesGroup, Prompt, Scorer


def provenance(scorers: Mapping[str, Scorer]) -> dict[str, Any]:
    """What results record of each scorer that has weights, by its name."""
    found = {name: weights_of(scorer) for name, scorer in scorers.items()}
    return {name: record for name, record in found.items() if record}


def compares_group(scorer: Scorer) -> bool:
    """Whether the scorer's value of an image depends on the others of the prompt."""
    return isinstance(scorer, ComparesGroup) and scorer.compares_group


def self_check(scorers: Mapping[str, Scorer]) -> None:
    """Raises ValueError where one of the scorers does not know its answers, with the scorer's name."""
    for name, scorer in scorers.items():
        if isinstance(scorer, ChecksItself):
            try:
                scorer.self_check()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def check(scorer: Scorer, prompts: Sequence[Prompt], name: str) -> None:
    """Raises ValueError for a prompt that the scorer cannot score, with `name`."""
    if isinstance(scorer, ChecksPrompts):
        try:
            scorer.check(prompts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
