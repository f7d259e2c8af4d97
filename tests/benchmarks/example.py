"""A benchmark small enough to count by hand, and a random tiny Janus to draw its images with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stage.benchmarks.shapes import ShapesBenchmark
from stage.data import prompt_id
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.template import Template
from stage.types import Prompt, Scores
from tests.policy.tiny_model import build_tiny_janus

PLAIN = Template("plain", "", "")
TEXTS = (
    ("colors", "a red circle"),
    ("colors", "a photo of a green square"),
    ("counting", "two blue triangle"),
)


class Bright:
    """Strict where the mean pixel is at least `threshold`; partial is the mean pixel in [0, 1]."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        partial = images.double().mean(dim=(2, 3, 4)) / 255
        strict = (partial >= self.threshold).double()
        reasons = tuple(tuple(f"mean {value:.4f}" for value in group) for group in partial.tolist())
        return Scores(torch.stack([partial, strict], -1).float(), ("partial", "strict"), (1.0, 0.0), reasons)


def prompts(texts: Sequence[tuple[str, str]] = TEXTS) -> tuple[Prompt, ...]:
    return tuple(Prompt(prompt_id(text), text, {"tag": tag, "prompt": text}) for tag, text in texts)


def benchmark(images_per_prompt: int = 4, threshold: float = 0.5) -> ShapesBenchmark:
    splits = {"validation": prompts(), "heldout": prompts(TEXTS[:2])}
    return ShapesBenchmark("example", splits, images_per_prompt, Bright(threshold), "strict", ["partial"])


def tiny_policy(folder: Path) -> JanusPolicy:
    """The tiny Janus of the policy tests, written to `folder` once."""
    if not (folder / "config.json").is_file():
        build_tiny_janus(folder)
    policy = load_policy(str(folder), PLAIN, "float32", [], False)
    return policy.eval().requires_grad_(False)
