"""GenEval as a reward, for any detector: recipes differ in the detector and the thresholds they name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stage.geneval import Colors, Judge, Ruling
from stage.provenance import weights_of
from stage.request import Request, parse_request
from stage.rewards import grid, known_answers
from stage.rewards.parts import Parts
from stage.types import (
    BatchColorClassifier,
    ColorClassifier,
    Detection,
    Detections,
    Detector,
    NamesClasses,
    NamesColors,
    Prompt,
    Scores,
)

PARTIAL = ("bounded", "released")
PARTS = ("partial", "strict", "correct")
# Bundled pictures, the class of the one object in each, and its colour: of COCO, and of the embedded world.
KNOWN_ANSWERS = (("stop_sign.png", "stop sign", "red"), ("red_circle.png", "circle", "red"))


class GenEvalReward:
    """Scores images by what a detector finds in them. See `stage.geneval` for what the parts mean.

    A picture that cannot be scored stops the run: a detector that fails, a prompt without usable metadata or
    one that names what the detector cannot know is an error and never a reward of 0.

    Args:
        detector: finds the objects. When it says which classes it knows (`NamesClasses`), prompts are held to
            them.
        color_classifier: names their colours; null means that the detector does both. Likewise `NamesColors`.
        partial: `bounded`, in [0, 1], or `released`, the published training reward, which has no lower limit.
        weights: the parts to report and their weights: any of `partial`, `strict` (`strict_correct`, 0 or 1)
            and `correct` (the benchmark's verdict, 0 or 1). A part of weight 0 is logged only.
        threshold, counting_threshold, max_objects, nms_threshold, position_margin: see `stage.geneval.Judge`.
    """

    def __init__(
        self,
        detector: Detector,
        color_classifier: ColorClassifier | None,
        partial: str,
        weights: Mapping[str, float],
        threshold: float,
        counting_threshold: float,
        max_objects: int,
        nms_threshold: float,
        position_margin: float,
    ) -> None:
        if not isinstance(detector, Detector):
            raise ValueError(
                f"detector must have detect(images), got {type(detector).__name__}; see stage.types"
            )
        classifier = detector if color_classifier is None else color_classifier
        if not isinstance(classifier, ColorClassifier):
            raise ValueError(
                f"something must name colours: color_classifier is {color_classifier!r} and "
                f"{type(classifier).__name__} has no colors(image, class_name, objects); give one that has"
            )
        if partial not in PARTIAL:
            raise ValueError(f"partial is one of {', '.join(PARTIAL)}, got {partial!r}; choose one")
        self.parts = Parts(weights, PARTS)
        self.names, self.weights = self.parts.names, self.parts.weights
        self.detector = detector
        self.color_classifier = classifier
        self.partial = partial
        self.judge = Judge(threshold, counting_threshold, max_objects, nms_threshold, position_margin)

    @property
    def provenance(self) -> dict[str, Any]:
        """What results record of the detector and the colour classifier, where they have weights."""
        parts: dict[str, Any] = {"detector": self.detector}
        if self.color_classifier is not self.detector:
            parts["color_classifier"] = self.color_classifier
        found = {name: weights_of(part) for name, part in parts.items()}
        return {name: record for name, record in found.items() if record}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for the first prompt that cannot be scored, whatever its images show."""
        for prompt in prompts:
            self._request(prompt)

    def self_check(self) -> None:
        """Raises ValueError unless a bundled picture is right, and plain grey wrong, alone and side by side.

        A detector that names its classes is shown what it can find; of one that does not no answer is known.
        """
        names = self.detector.class_names if isinstance(self.detector, NamesClasses) else ()
        for file, name, color in KNOWN_ANSWERS:
            if name in names:
                self._know(file, {"tag": "colors", "include": [{"class": name, "count": 1, "color": color}]})

    def _know(self, file: str, metadata: Mapping[str, Any]) -> None:
        request, shown = parse_request(metadata), known_answers.picture(file)
        pair = torch.stack([shown, known_answers.grey(len(shown))]).numpy()
        batches = (pair, pair[:1], pair[1:])
        right, wrong, alone, nothing = (
            ruling for batch in batches for ruling in self._rule([request] * len(batch), batch)
        )
        for ruling in (right, alone):
            if not ruling.correct:
                raise ValueError(f"the detector must judge {file} right; it is wrong: {ruling.strict_reason}")
        if wrong.correct or nothing.correct:
            raise ValueError(
                f"the detector must find nothing in plain grey; it finds a {metadata['include'][0]['class']}"
            )

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]` and P prompts to parts `[P, G, R]` on the same device; R weights.

        Raises:
            ValueError: the images or a prompt cannot be scored, or the detector or colour classifier fails.
        """
        grid.check_images(images, prompts)
        requests = [self._request(prompt) for prompt in prompts]
        pictures = images.flatten(0, 1).cpu().numpy()
        group = images.shape[1]
        rulings = self._rule([requests[i // group] for i in range(len(pictures))], pictures)
        return self.parts.scores(
            images,
            [self._values(ruling) for ruling in rulings],
            [_reason(ruling) for ruling in rulings],
            {name: self._range(name) for name in PARTS},
        )

    def _rule(self, requests: Sequence[Request], pictures: np.ndarray) -> list[Ruling]:
        """The verdict on each picture `[N, H, W, 3]` about its request."""
        found = self._detect(pictures)
        colors = self._colors(requests, pictures, found)
        return [self.judge.rule(*row) for row in zip(requests, found, colors, strict=True)]

    def _request(self, prompt: Prompt) -> Request:
        """What the prompt asks for, if this detector and classifier can tell."""
        try:
            request = parse_request(prompt.metadata)
        except ValueError as error:
            bare = prompt.metadata.get("tag") is None and prompt.metadata.get("include") is None
            remedy = ". It comes without GenEval's metadata: give a prompt file that has it, or take another reward"
            raise ValueError(
                f"the prompt {prompt.text!r} cannot be scored: {error}{remedy if bare else ''}"
            ) from error
        for clause in request.include + request.exclude:
            if isinstance(self.detector, NamesClasses):
                _known(prompt, "class", clause.name, self.detector.class_names)
            if isinstance(self.color_classifier, NamesColors) and clause.color is not None:
                _known(prompt, "colour", clause.color, self.color_classifier.color_names)
        return request

    def _detect(self, pictures: np.ndarray) -> Sequence[Detections]:
        """One mapping of detections for each picture `[N, H, W, 3]`."""
        detector = type(self.detector).__name__
        try:
            found = self.detector.detect(pictures)
        except Exception as error:
            raise ValueError(
                f"every picture must be looked at before it is rewarded, but {detector} failed on "
                f"{len(pictures)} of shape {pictures.shape[1:]}: {error!r}; repair it, no reward was made up"
            ) from error
        if len(found) != len(pictures):
            raise ValueError(
                f"a detector returns one mapping for each picture, {detector} gave {len(found)} for "
                f"{len(pictures)}; repair how it batches"
            )
        return found

    def _colors(
        self, requests: Sequence[Request], pictures: np.ndarray, found: Sequence[Detections]
    ) -> list[Colors]:
        """For each picture what names the colours of its objects; asked for all at once where that is possible."""
        classifier = self.color_classifier
        if not isinstance(classifier, BatchColorClassifier):
            return [partial(self._name_colors, picture) for picture in pictures]
        asked = [self.judge.to_color(*pair) for pair in zip(requests, found, strict=True)]
        sights = [(pictures[i], *one) for i, several in enumerate(asked) for one in several]
        try:
            named = classifier.colors_in_batches(sights)
        except Exception as error:
            raise self._colorless(error, f"{len(sights)} kinds of objects") from error
        if len(named) != len(sights):
            raise ValueError(
                f"a colour classifier answers for each kind of objects, {type(classifier).__name__} gave "
                f"{len(named)} answers for {len(sights)}; repair how it batches"
            )
        answers = iter(named)
        known = [{(name, len(objects)): next(answers) for name, objects in several} for several in asked]
        return [partial(_recall, one) for one in known]

    def _name_colors(self, picture: np.ndarray, name: str, objects: Sequence[Detection]) -> list[str]:
        try:
            return self.color_classifier.colors(picture, name, objects)
        except Exception as error:
            raise self._colorless(error, f"{len(objects)} {name!r}") from error

    def _colorless(self, error: Exception, objects: str) -> ValueError:
        return ValueError(
            f"every colour that decides must be looked at, but {type(self.color_classifier).__name__} failed on "
            f"{objects}: {error!r}; repair it, no reward was made up"
        )

    def _range(self, part: str) -> tuple[float, float]:
        """Lowest and highest value of a part."""
        return (-math.inf if part == "partial" and self.partial == "released" else 0.0, 1.0)

    def _values(self, ruling: Ruling) -> dict[str, float]:
        """The parts of one picture."""
        return {
            "partial": ruling.bounded if self.partial == "bounded" else ruling.released,
            "strict": float(ruling.strict_correct),
            "correct": float(ruling.correct),
        }


def _recall(
    known: Mapping[tuple[str, int], Sequence[str]], name: str, objects: Sequence[Detection]
) -> Sequence[str]:
    """The colours named before of this many objects of a class."""
    return known[name, len(objects)]


def _known(prompt: Prompt, kind: str, name: str, known: Sequence[str]) -> None:
    """Raises ValueError when nothing can tell `name`: every picture would be wrong."""
    if name not in known:
        raise ValueError(
            f"the prompt {prompt.text!r} asks for the {kind} {name!r}, but only {', '.join(known)} can be "
            f"told; choose prompts that fit the detector and the colour classifier, or the other way round"
        )


def _reason(ruling: Ruling) -> str:
    if not ruling.strict_reason:
        return "as asked"
    return f"{'correct, but not strictly' if ruling.correct else 'wrong'}: {ruling.strict_reason}"
