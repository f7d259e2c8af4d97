"""Text as a reward: how much of the words that the prompt quotes can be read in the picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from stage.detectors.text_pool import TextPool
from stage.rewards import grid
from stage.rewards.parts import Parts
from stage.types import Prompt, Scores, TextReader

PARTS = ("ocr", "strict")
# An opening double quote, and the text up to what closes it or to the end of the prompt.
QUOTED = re.compile(r'"(?P<straight>[^"]*)|[“„‟](?P<curved>[^”“‟]*)')
# Word and side in pixels of the pictures that a reader must be able to read before it may judge.
KNOWN_ANSWERS = (("STAGE", 384), ("CAT", 96))


def quoted(prompt: str) -> str:
    """The first string of a prompt in double quotes, straight or typographic, as it stands there.

    Raises:
        ValueError: nothing is quoted, or nothing but spaces.
    """
    found = QUOTED.search(prompt)
    text = "" if found is None else found["straight"] or found["curved"] or ""
    if not normalised(text):
        raise ValueError(
            f"the ocr reward reads what the prompt puts in double quotes, {prompt!r} quotes nothing; write the words "
            f'like a sign that says "OPEN", or take another reward'
        )
    return text


def normalised(text: str) -> str:
    """Without spaces and in small letters, as both sides are compared."""
    return text.replace(" ", "").lower()


def similarity(target: str, lines: Sequence[str]) -> float:
    """`1 - min(d, n) / n` in [0, 1], with d the edit distance of `lines`, joined, to `target`, which has n letters.

    d is 0 where the target stands anywhere in what was read. Both are `normalised`; the target is not empty.
    """
    wanted, read = normalised(target), normalised("".join(lines))
    distance = 0 if wanted in read else Levenshtein.distance(read, wanted)
    return 1 - min(distance, len(wanted)) / len(wanted)


class OcrReward:
    """The reward `ocr` of the STAGE release and of Flow-GRPO, for any engine that reads text.

    Sources: krennic999/STAGE src/grpo/src/utils/reward_ocr.py, yifan123/flow_grpo flow_grpo/ocr.py (`OcrScorer`), which
    are the same arithmetic on PaddleOCR 2 with English PP-OCRv3 and v4 models. Departures:

    1. An engine that fails is an error; there it is a reward of 0, with a line in the console.
    2. Typographic double quotes count, and the first of either kind is taken. Single quotes are none here either.
    3. A prompt without quotes, or with nothing in them, is refused before the first rollout; there it is an IndexError
       or a division by 0 in the middle of the run.
    4. Engines get the colours in the order they expect (BGR); there they get RGB.
    5. The part `strict` says whether the whole text was found; it is logged only, unless it has a weight.

    Args:
        reader: makes the engine; called once in each process.
        processes: processes that read; 0 reads in this one.
        weights: the parts to report and their weights: any of `ocr`, in [0, 1], and `strict`, 0 or 1. A part of
            weight 0 is logged only.

    Raises:
        ValueError: for weights that no part has.
    """

    def __init__(
        self, reader: Callable[[], TextReader], processes: int, weights: Mapping[str, float]
    ) -> None:
        self.parts = Parts(weights, PARTS)
        self.names, self.weights = self.parts.names, self.parts.weights
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 0:
            raise ValueError(
                f"processes is the number of processes that read, or 0 for this one, got {processes!r}; choose one"
            )
        self.reader: TextReader = TextPool(reader, processes) if processes else reader()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Engine and weight files, for the record of a run."""
        return self.reader.provenance

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that quotes no text."""
        for prompt in prompts:
            quoted(prompt.text)

    def self_check(self) -> None:
        """Raises ValueError when the engine cannot read what it must be able to read."""
        for word, side in KNOWN_ANSWERS:
            (lines,) = self.reader.read(np.asarray(written(word, side))[None])
            if normalised("".join(lines)) != normalised(word):
                raise ValueError(
                    f"an engine must read a black {word!r} on white in {side} pixels before it may judge, it read "
                    f"{list(lines)}; go back to the settings of conf/reward/ocr.yaml"
                )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to parts `[P, G, R]` on the same device; R weights.

        Raises:
            ValueError: the images or a prompt cannot be scored. What the engine raises is raised as it is.
        """
        grid.check_images(images, prompts)
        targets = [quoted(prompt.text) for prompt in prompts]
        read = self.reader.read(images.flatten(0, 1).cpu().numpy())
        group = images.shape[1]
        reached = [similarity(targets[i // group], lines) for i, lines in enumerate(read)]
        values = [{"ocr": value, "strict": float(value == 1)} for value in reached]
        reasons = [
            f"read {' '.join(lines)!r}, asked for {targets[i // group]!r}" for i, lines in enumerate(read)
        ]
        return self.parts.scores(images, values, reasons, dict.fromkeys(PARTS, (0.0, 1.0)))


def written(word: str, side: int) -> Image.Image:
    """A black word on a white square of `side` pixels, in the font that Pillow carries."""
    picture = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(size=side // 4)
    ImageDraw.Draw(picture).text((side // 2, side // 2), word, fill="black", font=font, anchor="mm")
    return picture
