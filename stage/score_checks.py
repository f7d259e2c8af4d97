"""What scores must be before anything learns from them: finite, and in the range that their scorer states.

And what a scorer must know before it is asked at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stage.types import ChecksItself, Prompt, Scores

SLACK = 1e-4  # share of the width of a range by which rounding may leave it


class UnusableScores(ValueError):
    """Scores that no training may use, with the images that caused them.

    `images` uint8 `[N, H, W, 3]`, with one line of `notes` each: prompt, sample, part and value.
    """

    def __init__(self, message: str, images: Tensor, notes: Sequence[str]) -> None:
        super().__init__(message)
        self.images, self.notes = images, tuple(notes)


def check_itself(scorer: object, wanted: bool) -> None:
    """Let a scorer that can (`ChecksItself`) score pictures with a known answer, unless that is not wanted.

    Raises:
        ValueError: it gives another answer.
    """
    if wanted and isinstance(scorer, ChecksItself):
        try:
            scorer.self_check()
        except ValueError as error:
            raise ValueError(
                f"a reward must know the answers of the bundled pictures before it judges others: {error}. Check its "
                f"weights and settings; self_check=false goes on all the same"
            ) from error


def check_values(scores: Scores, images: Tensor, prompts: Sequence[Prompt], scorer: str) -> None:
    """Raise unless the parts `[P, G, R]` of images `[P, G, H, W, 3]` are numbers in the range that is stated for them.

    Raises:
        ValueError: there are other than R ranges.
        UnusableScores: a part is NaN, infinite or outside of its range; the message begins with `scorer`.
    """
    parts, ranges = scores.parts, scores.ranges
    if ranges is not None and len(ranges) != len(scores.names):
        raise ValueError(
            f"every part has one range, low and high, {scorer} gave {ranges} for {scores.names}; repair the scorer"
        )
    bad, rule = ~torch.isfinite(parts), "reward parts must be finite"
    if ranges is not None and not bad.any():
        bad, rule = _outside(parts, ranges), "reward parts must lie in the range that is stated for them"
    if bad.any():
        notes = _notes(bad, scores, prompts)
        first, *others = notes.values()
        message = f"{rule}, {scorer} gave: {first}, and {len(others)} other images like it; repair the scorer"
        wrong = torch.stack([images[place] for place in notes]).cpu()
        raise UnusableScores(message, wrong, [first, *others])


def _outside(parts: Tensor, ranges: Sequence[tuple[float, float]]) -> Tensor:
    """bool `[P, G, R]`: values outside of `ranges` by more than rounding."""
    low, high = parts.new_tensor(ranges, dtype=torch.float64).unbind(dim=-1)
    width = high - low
    slack = SLACK * torch.where(width.isfinite(), width, torch.ones_like(width))
    return (parts < low - slack) | (parts > high + slack)


def _notes(bad: Tensor, scores: Scores, prompts: Sequence[Prompt]) -> dict[tuple[int, int], str]:
    """For each image with a bad part, by prompt and sample: its first one in words."""
    notes: dict[tuple[int, int], str] = {}
    for prompt, sample, part in bad.nonzero().tolist():
        value = scores.parts[prompt, sample, part].item()
        note = f"sample {sample} of {prompts[prompt].text!r} got {value} in part {scores.names[part]!r}"
        if scores.ranges is not None:
            note += f", whose range is {list(scores.ranges[part])}"
        notes.setdefault((prompt, sample), note)
    return notes
