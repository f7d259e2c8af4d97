"""What a reward service and its clients say to each other: JSON with PNG or WebP images in base64, never pickle.

    POST /v1/score   ScoreRequest -> ScoreAnswer     images of P prompts, G each, all of one size
    POST /v1/check   CheckRequest -> Checked         whether these prompts can be scored at all
    GET  /v1/about   -> About                        which scorer answers

The version in the path and in every body is `VERSION`; a change of meaning raises it.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from stage.types import Prompt, Scores

VERSION: Literal[1] = 1
FORMATS = ("PNG", "WEBP")
MAX_PROMPTS, MAX_GROUP, MAX_TEXT, MAX_SIDE = 4096, 1024, 20_000, 4096
MAX_PIXELS = 2**28  # of a request, 0.8 GB: a small file may unpack to a large picture

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Message(BaseModel):
    """The base of every body: unknown keys are errors, so that a misspelt one is not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)
    version: Literal[1]


class WirePrompt(BaseModel):
    """`stage.types.Prompt`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: int = Field(ge=0, lt=2**64)
    text: str = Field(min_length=1, max_length=MAX_TEXT)
    metadata: dict[str, Any] = {}


class CheckRequest(Message):
    prompts: list[WirePrompt] = Field(min_length=1, max_length=MAX_PROMPTS)


class ScoreRequest(Message):
    """`images[p][g]` is sample g of `prompts[p]`, a PNG or WebP file in base64."""

    prompts: list[WirePrompt] = Field(min_length=1, max_length=MAX_PROMPTS)
    images: list[Annotated[list[str], Field(min_length=1, max_length=MAX_GROUP)]] = Field(min_length=1)


class Checked(Message):
    scorer: str


class About(Message):
    """`scorer` is a sha256 over the scorer's configuration and the weights it names.

    Where `compares_group` is true every request must have all images of its prompts.
    """

    scorer: str
    reward: str
    provenance: dict[str, Any]
    compares_group: bool = False


class ScoreAnswer(Message):
    """`stage.types.Scores` as lists, with the scorer that gave them. A range whose end is null has none there."""

    scorer: str
    names: list[str]
    weights: list[Finite]
    parts: list[list[list[Finite]]]
    reasons: list[list[str]]
    ranges: list[tuple[Finite | None, Finite | None]] | None


def to_prompts(prompts: Sequence[WirePrompt]) -> tuple[Prompt, ...]:
    return tuple(Prompt(prompt.id, prompt.text, prompt.metadata) for prompt in prompts)


def from_prompts(prompts: Sequence[Prompt]) -> list[WirePrompt]:
    return [WirePrompt(id=p.id, text=p.text, metadata=dict(p.metadata)) for p in prompts]


def encode_image(image: np.ndarray) -> str:
    """uint8 RGB `[H, W, 3]` as a PNG in base64: lossless, so that a remote score is a local score."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode_image(text: str) -> np.ndarray:
    """The uint8 RGB `[H, W, 3]` of a PNG or WebP in base64. Raises ValueError for anything else."""
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"an image must be base64 without line breaks: {error}") from error
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_picture(image)
            return np.array(image)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"an image must be a whole PNG or WebP file; it is not: {error}") from error


def _check_picture(image: Image.Image) -> None:
    # Size and mode stand in the header: nothing is unpacked before they are known to be fine.
    if image.mode != "RGB" or getattr(image, "n_frames", 1) != 1:
        raise ValueError(f"an image must be one RGB picture; got mode {image.mode}. Convert it to RGB.")
    if max(image.size) > MAX_SIDE:
        raise ValueError(
            f"an image may have {MAX_SIDE} pixels a side; got {image.size[0]} x {image.size[1]}."
        )


def decode_images(rows: Sequence[Sequence[str]], prompts: int) -> Tensor:
    """Images uint8 `[P, G, H, W, 3]`. Raises ValueError unless there are P rows of G images of one size."""
    if len(rows) != prompts or len({len(row) for row in rows}) != 1:
        raise ValueError(
            f"images must be {prompts} lists, one a prompt, of one length; got lengths {[len(row) for row in rows]}"
        )
    pictures: list[np.ndarray] = []
    for text in itertools.chain.from_iterable(rows):
        pictures.append(decode_image(text))
        shape, first = pictures[-1].shape, pictures[0].shape
        if shape != first:
            raise ValueError(f"all images of a request must have one size; got {first} and {shape}")
        if shape[0] * shape[1] * prompts * len(rows[0]) > MAX_PIXELS:
            raise ValueError(
                f"images of a request may have {MAX_PIXELS} pixels in all; got {prompts * len(rows[0])} of "
                f"{shape[1]} x {shape[0]}. Send fewer at once."
            )
    return torch.from_numpy(np.stack(pictures)).unflatten(0, (prompts, len(rows[0])))


def to_answer(scores: Scores, scorer: str) -> ScoreAnswer:
    """Scores for the wire. Raises ValueError for parts that are not finite (pydantic's), gates and schedules."""
    if scores.gates is not None or scores.schedules is not None:
        raise ValueError(
            "gates and schedules belong to a run and are not served; serve the scorers without them and combine them "
            "where training runs"
        )
    return ScoreAnswer(
        version=VERSION,
        scorer=scorer,
        names=list(scores.names),
        weights=list(scores.weights),
        parts=scores.parts.tolist(),
        reasons=[list(row) for row in scores.reasons],
        ranges=None if scores.ranges is None else [(_end(low), _end(high)) for low, high in scores.ranges],
    )


def _end(value: float) -> float | None:
    return value if math.isfinite(value) else None


def from_answer(answer: ScoreAnswer, prompts: int, group: int) -> Scores:
    """The scores of an answer. Raises ValueError unless it speaks of `[prompts, group]` images, within its ranges."""
    columns = len(answer.names)
    lengths = {(len(row), len(parts)) for row in answer.parts for parts in row}
    whole = len(answer.parts) == len(answer.reasons) == prompts and lengths == {(group, columns)}
    if not whole or {len(row) for row in answer.reasons} != {group} or len(answer.weights) != columns:
        raise ValueError(
            f"an answer must hold {columns} parts and a reason for each of {prompts} x {group} images; got "
            f"{len(answer.parts)} rows of (samples, parts) {sorted(lengths)}"
        )
    parts = torch.tensor(answer.parts, dtype=torch.float32)
    ranges = None
    if answer.ranges is not None:
        ranges = tuple(
            (-math.inf if low is None else low, math.inf if high is None else high)
            for low, high in answer.ranges
        )
        _check_ranges(parts, answer.names, ranges)
    reasons = tuple(tuple(row) for row in answer.reasons)
    return Scores(parts, tuple(answer.names), tuple(answer.weights), reasons, ranges)


def _check_ranges(parts: Tensor, names: Sequence[str], ranges: Sequence[tuple[float, float]]) -> None:
    if len(ranges) != len(names):
        raise ValueError(f"an answer with ranges must have one a part; got {len(ranges)} for {len(names)}")
    for index, (name, (low, high)) in enumerate(zip(names, ranges, strict=True)):
        column = parts[..., index]
        # The bounds themselves may be rounded on their way through float32.
        slack = 1e-6 * max([1.0, *(abs(end) for end in (low, high) if math.isfinite(end))])
        if column.min() < low - slack or column.max() > high + slack:
            raise ValueError(
                f"the part {name!r} must lie in [{low}, {high}]; got {column.min().item()} to {column.max().item()}"
            )
