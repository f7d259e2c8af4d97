"""Whether the other half of Janus still works: a user's questions about images, answered before and after training.

A probe is a file of JSON lines beside its images:

    {"image": "kitchen.jpg", "question": "How many chairs are there?", "answer": ["three", "3"], "topic": "counting"}

`answer` is one text or several of which one is enough, on all lines or on none; `topic` is the row of the table.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from stage.benchmarks.benchmark import Benchmark, Rows, Verdict
from stage.benchmarks.evaluation import Candidate, Judged, progress
from stage.benchmarks.images import Images, load_picture
from stage.paths import resolve, sha256
from stage.policy.sampler import Sampler
from stage.policy.understanding import PLACE, answer
from stage.prompt_files import prompt_id
from stage.types import Prompt

WITHOUT_SIGNS = str.maketrans({sign: " " for sign in string.punctuation})
SHOWN = 3  # examples in a message


def read_probe(path: str) -> tuple[Prompt, ...]:
    """The questions of a probe; each knows its `image`, as an absolute path, the sha256 of it, and its `answers`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: lines that are no questions, or images that are missing or damaged; with counts.
    """
    file = resolve(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"a probe is a file of JSON lines with image, question and answer, {str(file)!r} is none; give "
            "benchmark.splits.probe.path=FILE"
        )
    faults: dict[str, list[str]] = {}
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if text.strip():
            kind, value = _question(file.parent, text)
            if isinstance(value, Prompt):
                found.append(value)
            else:
                faults.setdefault(kind, []).append(f"line {number}: {value}")
    answered = sum(bool(prompt.metadata["answers"]) for prompt in found)
    if 0 < answered < len(found):
        faults["without an answer, where others have one"] = [
            prompt.text for prompt in found if not prompt.metadata["answers"]
        ]
    if faults or not found:
        listed = "; ".join(
            f"{len(several)} {kind} ({', '.join(several[:SHOWN])}{', ...' if len(several) > SHOWN else ''})"
            for kind, several in faults.items()
        )
        raise ValueError(
            f"a probe has a question about a readable image on every line, {file} has {len(found)} such lines"
            f"{' and ' if faults else ''}{listed}. Nothing was asked; repair the file"
        )
    return tuple(found)


class UnderstandingBenchmark(Benchmark):
    """`unchanged`: the share of answers that are the base's; and `correct`, where the probe has answers.

    An answer is correct when one of the expected texts stands in it, letter case and punctuation aside.

    Args:
        question: the words around a question, with `{image}` and `{question}`, as the model was taught.
        max_new_tokens: an answer ends with the end token, or here.
        name, splits, rows: see `Benchmark`; prompts as `read_probe` gives them.
    """

    question: str
    max_new_tokens: int

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Prompt]],
        rows: Rows,
        question: str,
        max_new_tokens: int,
    ) -> None:
        answered = all(prompt.metadata["answers"] for prompts in splits.values() for prompt in prompts)
        headline, beside = ("correct", ("unchanged",)) if answered else ("unchanged", ())
        super().__init__(name, splits, 1, None, headline, beside, rows, False, False, None)
        if question.count(PLACE) != 1 or question.count("{question}") != 1 or max_new_tokens < 1:
            raise ValueError(
                f"benchmark.question needs {PLACE} and {{question}} once, and benchmark.max_new_tokens at least 1; got "
                f"{question!r} and {max_new_tokens}"
            )
        object.__setattr__(self, "question", question)
        object.__setattr__(self, "max_new_tokens", max_new_tokens)

    @property
    def draws(self) -> bool:
        return False

    def identity(self, prompt: Prompt) -> tuple[str, ...]:
        """A question may be asked about several images."""
        return (prompt.text, str(prompt.metadata["image"]))

    def judge_models(
        self,
        candidates: Sequence[Candidate],
        folders: Mapping[str, Mapping[str, Images]],
        splits: Sequence[str],
        sampler: Sampler,
        batch_size: int,
        console: Console,
    ) -> list[Judged]:
        """A line for each question and role. Questions are asked one by one, so no answer depends on another."""
        found: dict[tuple[str, str, int], str] = {}
        total = len(candidates) * sum(len(self.prompts(split)) for split in splits)
        with progress("questions", total, 0, console) as advance:
            for item in candidates:
                policy = item.load()
                for split in splits:
                    for index, prompt in enumerate(self.prompts(split)):
                        text = self.question.replace("{question}", prompt.text)
                        found[item.role, split, index] = answer(
                            policy, _picture(prompt), text, self.max_new_tokens
                        )
                        advance(1)
                del policy
        return [
            Judged(
                role=item.role,
                split=split,
                file=Path(str(prompt.metadata["image"])),
                prompt=prompt.text,
                prompt_id=prompt.id,
                index=index,
                sample=0,
                rows=tuple(self.rows(prompt)),
                verdict=_verdict(prompt, found[item.role, split, index], found["base", split, index]),
            )
            for item in candidates
            for split in splits
            for index, prompt in enumerate(self.prompts(split))
        ]


def plain(text: str) -> str:
    """Words in lower case without punctuation, one space between them and one around."""
    return f" {' '.join(text.casefold().translate(WITHOUT_SIGNS).split())} "


def _verdict(prompt: Prompt, said: str, base: str) -> Verdict:
    parts = {"unchanged": float(plain(said) == plain(base))}
    answers = prompt.metadata["answers"]
    if answers:
        parts["correct"] = float(any(plain(expected) in plain(said) for expected in answers))
    return Verdict(parts, f"“{said}”")


def _question(folder: Path, text: str) -> tuple[str, Prompt | str]:
    """A question, or the kind of fault of a line and what is wrong."""
    try:
        line = json.loads(text)
    except ValueError as error:
        return "that are no JSON", str(error)
    asked, image = (line.get(key) if isinstance(line, dict) else None for key in ("question", "image"))
    if not (isinstance(asked, str) and asked.strip() and isinstance(image, str) and image):
        return "without question or image", text[:80]
    given = line.get("answer", [])
    answers = [given] if isinstance(given, str) else given
    if not isinstance(answers, list) or not all(
        isinstance(one, str) and plain(one).strip() for one in answers
    ):
        return "whose answer is no text", repr(given)
    path = (folder / image).absolute()
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        return "whose image is missing", image
    except (OSError, SyntaxError) as error:  # Pillow reports a broken image as either
        return "whose image is damaged", f"{image} ({error})"
    known: dict[str, Any] = {**line, "answers": answers, "image": str(path), "sha256": sha256(path)}
    return "", Prompt(prompt_id(asked), asked, known)


def _picture(prompt: Prompt) -> np.ndarray:
    return load_picture(Path(str(prompt.metadata["image"])), "put it back where the probe says it is")
