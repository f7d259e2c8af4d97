"""What GenEval says about one picture, given the objects found in it: once, for training and for evaluation.

The objects and their colours come from outside (`stage.types.Detector`, `stage.types.ColorClassifier`).

correct         The benchmark's verdict. At least `count` objects of each include; the `count` most confident
                of them have the colour and stand in the relation to every object of the include they refer
                to; no exclude is reached. Source: djghosh13/geneval evaluation/evaluate_images.py.
strict_correct  The verdict of the training reward: exactly `count` objects, and excludes are not read.
                Source: yifan123/reward-server reward_server/gen_eval.py, which krennic999/STAGE copies in
                src/grpo/src/utils/reward_geneval.py.
released        The partial credit which those two train on: a mean of terms, at most 1, without lower limit.
bounded         The same idea in [0, 1]. Departures:
                1. A surplus of objects costs at most the whole count term. Released: the term
                   1 - |count - found| / count has no floor, and one crowded picture outweighs its group.
                2. A wrong relation scores 0. Released: 0 and then, in any case, another term of 1.
                3. Every requirement is a term, reached or not, so that all pictures of a prompt are means
                   over equally many. Released: a relation behind a wrong colour is no term; colour and
                   relation behind a wrong count are one term together.
                4. An exclude of a class that no include names is a term. Released: ignored. (An exclude of an
                   included class adds nothing: the count term has already fallen.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stage.request import RELATIONS, Clause, Request
from stage.types import Detection, Detections

COUNTING = "counting"  # the tag of prompts that are judged with the counting threshold

Box = tuple[float, float, float, float]
Colors = Callable[[str, Sequence[Detection]], Sequence[str]]
Kept = Mapping[str, Sequence[Detection]]


@dataclass(frozen=True)
class Ruling:
    """What the judge says about one picture; see the top of this file for the four answers.

    `reason` says what keeps `correct` from being true, `strict_reason` what keeps `strict_correct` from being
    true or `bounded` from being 1. Each is empty when there is nothing to say.
    """

    correct: bool
    strict_correct: bool
    bounded: float
    released: float
    reason: str
    strict_reason: str


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes of inclusive pixels: as in GenEval, a side is x1 - x0 + 1."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0.0) * max(y1 - y0 + 1, 0.0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - shared
    return shared / union if union else 0.0


def suppress(objects: Sequence[Detection], limit: float) -> tuple[Detection, ...]:
    """Without the objects that overlap an earlier kept one by `limit` or more; a limit of 1 drops nothing."""
    if limit == 1:
        return tuple(objects)
    kept: list[Detection] = []
    for thing in objects:
        if all(overlap(thing.box, other.box) < limit for other in kept):
            kept.append(thing)
    return tuple(kept)


def relations(a: Box, b: Box, margin: float) -> tuple[str, ...]:
    """How box `a` stands to box `b`: none, one or two of RELATIONS, in pixels with y growing downwards.

    The offset between the centres is shortened on each axis by `margin` times the sum of the two sides. A
    relation holds where what is left exceeds half the length of the whole offset: within 60 degrees of the
    axis, or less.
    """
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    sides = [abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k]) for k in (0, 1)]
    left = [math.copysign(max(abs(o) - margin * s, 0.0), o) for o, s in zip(offset, sides, strict=True)]
    if max(map(abs, left)) < 1e-3:  # a thousandth of a pixel: nothing is left, and the offset may be zero
        return ()
    dx, dy = (rest / math.hypot(*offset) for rest in left)
    return tuple(name for name, far in zip(RELATIONS, (-dx, dx, -dy, dy), strict=True) if far > 0.5)


@dataclass(frozen=True)
class Finding:
    """One include against the picture; `reason` is empty when it is met.

    `right_color` (how many of `count`) and `placed` are None where they are not asked for or not reached.
    """

    clause: Clause
    found: int
    counted: bool
    right_color: int | None = None
    placed: bool | None = None
    target_met: bool = True
    reason: str = ""

    def released_terms(self) -> list[float]:
        """The released partial credit of this include, in the order in which it is summed."""
        count, asks_more = self.clause.count, bool(self.clause.color or self.clause.relation)
        terms = [1 - abs(count - self.found) / count]
        if not self.counted:
            return terms + [0.0] * asks_more
        if self.right_color is not None:
            terms.append(1 - abs(count - self.right_color) / count)
        if self.placed is not None:
            terms += [1.0] if self.placed else [0.0, 1.0] if self.target_met else [0.0]
        return terms

    def bounded_terms(self) -> list[float]:
        """One term in [0, 1] for the number, one for the colour and one for the relation, where asked for."""
        terms = [max(0.0, 1 - abs(self.clause.count - self.found) / self.clause.count)]
        if self.clause.color is not None:
            terms.append((self.right_color or 0) / self.clause.count)
        if self.clause.relation is not None:
            terms.append(float(self.placed is True))
        return terms


def find(request: Request, kept: Kept, colors: Colors, margin: float, *, exact: bool) -> list[Finding]:
    """Each include against the kept objects; `exact` asks for `count` objects instead of at least as many."""
    findings: list[Finding] = []
    for clause in request.include:
        target = findings[clause.target] if clause.relation is not None else None
        findings.append(_look(clause, target, kept, colors, margin, exact))
    return findings


def _look(
    clause: Clause, target: Finding | None, kept: Kept, colors: Colors, margin: float, exact: bool
) -> Finding:
    """One include: number, then colour, then relation; the first that fails ends it."""
    name, count = clause.name, clause.count
    found = len(kept.get(name, ()))
    if found < count or (exact and found > count):
        amount = f"{'exactly' if exact else 'at least'} {count}"
        return Finding(clause, found, counted=False, reason=f"expected {amount} {name}, found {found}")
    objects = kept[name][:count]
    right_color = None
    if clause.color is not None:
        named = colors(name, objects)
        right_color = list(named).count(clause.color)
        if right_color < count:
            reason = f"expected {count} {clause.color} {name}, found {right_color}: {', '.join(named)}"
            return Finding(clause, found, counted=True, right_color=right_color, reason=reason)
    if target is None:
        return Finding(clause, found, counted=True, right_color=right_color)
    reason = _misplaced(clause, objects, target, kept, margin)
    return Finding(clause, found, True, right_color, not reason, not target.reason, reason)


def _misplaced(
    clause: Clause, objects: Sequence[Detection], target: Finding, kept: Kept, margin: float
) -> str:
    """Why some object does not stand as asked to some object of the target; empty when all do."""
    other_name = target.clause.name
    wanted = f"expected {clause.name} {clause.relation} {other_name}"
    if target.reason:
        return f"{wanted}, but {other_name} is not there as asked"
    for thing in objects:
        for other in kept[other_name][: target.clause.count]:
            actual = relations(thing.box, other.box, margin)
            if clause.relation not in actual:
                return f"{wanted}, found it {' and '.join(actual) or 'in no clear relation to'} {other_name}"
    return ""


class Judge:
    """GenEval's rules with their numbers.

    Args:
        threshold: an object counts when its score is above this, in [0, 1] (GenEval: 0.3).
        counting_threshold: the same for prompts with the tag `counting` (GenEval: 0.9).
        max_objects: how many of the most confident objects of a class are looked at (GenEval: 16).
        nms_threshold: an object is dropped when a more confident one of its class overlaps it by this or
            more, in (0, 1]; 1 drops nothing (GenEval: 1.0).
        position_margin: share of the sides by which an offset is shortened, see `relations` (GenEval: 0.1).
    """

    def __init__(
        self,
        threshold: float,
        counting_threshold: float,
        max_objects: int,
        nms_threshold: float,
        position_margin: float,
    ) -> None:
        if not (0 <= threshold <= 1 and 0 <= counting_threshold <= 1):
            came = f"threshold {threshold!r} and counting_threshold {counting_threshold!r}"
            raise ValueError(f"thresholds are detector scores in [0, 1], got {came}; GenEval has 0.3 and 0.9")
        if not 0 < nms_threshold <= 1:
            raise ValueError(
                f"nms_threshold is an overlap in (0, 1], got {nms_threshold!r}; 1 switches it off"
            )
        if isinstance(max_objects, bool) or not isinstance(max_objects, int) or max_objects < 1:
            raise ValueError(f"max_objects is a positive integer, got {max_objects!r}; GenEval has 16")
        if not 0 <= position_margin < math.inf:
            raise ValueError(f"position_margin is 0 or more, got {position_margin!r}; GenEval has 0.1")
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.max_objects = max_objects
        self.nms_threshold = nms_threshold
        self.position_margin = position_margin

    def keep(self, detections: Detections, tag: str) -> dict[str, tuple[Detection, ...]]:
        """The objects that count, most confident first and equal scores by box; empty classes are left out.

        Raises:
            ValueError: a score or box is not finite; a comparison would silently drop the object.
        """
        limit = self.counting_threshold if tag == COUNTING else self.threshold
        kept: dict[str, tuple[Detection, ...]] = {}
        for name, objects in detections.items():
            for thing in objects:
                if len(thing.box) != 4 or not all(map(math.isfinite, (*thing.box, thing.score))):
                    raise ValueError(
                        f"a detection is four finite pixels and a finite score, got {thing.box} with "
                        f"{thing.score} for {name!r}; check the detector's weights and precision"
                    )
            best = sorted((o for o in objects if o.score > limit), key=lambda o: (-o.score, *o.box))
            if best:
                kept[name] = suppress(best[: self.max_objects], self.nms_threshold)
        return kept

    def to_color(self, request: Request, detections: Detections) -> list[tuple[str, Sequence[Detection]]]:
        """Class and objects of each question that `rule` would ask `colors`, for who wants to ask them together."""
        kept = self.keep(detections, request.tag)
        asked = {
            (clause.name, clause.count)
            for clause in request.include
            if clause.color is not None and len(kept.get(clause.name, ())) >= clause.count
        }
        return [(name, kept[name][:count]) for name, count in sorted(asked)]

    def rule(self, request: Request, detections: Detections, colors: Colors) -> Ruling:
        """The ruling on one picture.

        Args:
            request: what was asked for.
            detections: everything the detector found, in any order and of any score.
            colors: names the colour of each object of one class; called only where a colour decides.

        Raises:
            ValueError: a detection is not finite, or `colors` returns another number of names than objects.
        """
        kept = self.keep(detections, request.tag)
        once = _asked_once(colors)
        loose = find(request, kept, once, self.position_margin, exact=False)
        exact = find(request, kept, once, self.position_margin, exact=True)
        included = {clause.name for clause in request.include}
        present = [clause for clause in request.exclude if len(kept.get(clause.name, ())) >= clause.count]
        excesses = [f"expected fewer than {c.count} {c.name}, found {len(kept[c.name])}" for c in present]
        reasons = [finding.reason for finding in loose if finding.reason]
        strict_reasons = [finding.reason for finding in exact if finding.reason]
        bounded = [term for finding in exact for term in finding.bounded_terms()]
        bounded += [float(c not in present) for c in request.exclude if c.name not in included]
        released = [term for finding in exact for term in finding.released_terms()]
        return Ruling(
            correct=not (reasons or present),
            strict_correct=not strict_reasons,
            bounded=sum(bounded) / len(bounded),
            released=sum(released) / len(released),
            reason="; ".join(reasons + excesses),
            strict_reason="; ".join(strict_reasons + excesses),
        )


def _asked_once(colors: Colors) -> Colors:
    """`colors`, checked and remembered: both verdicts look at the same first objects of a class."""
    answers: dict[tuple[str, int], Sequence[str]] = {}

    def ask(name: str, objects: Sequence[Detection]) -> Sequence[str]:
        key = (name, len(objects))
        if key not in answers:
            answers[key] = colors(name, objects)
            if len(answers[key]) != len(objects):
                raise ValueError(
                    f"a colour classifier names one colour an object, got {len(answers[key])} for "
                    f"{len(objects)} {name!r}; check how it batches"
                )
        return answers[key]

    return ask
