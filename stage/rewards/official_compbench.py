"""Scores that T2I-CompBench's own scripts have written: nothing is judged here, vqa_result.json is read back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage.paths import sha256
from stage.rewards import grid
from stage.types import Prompt, Scores


class OfficialCompBench:
    """The `answer` of each image by its `question_id`: line of the prompt in its category's list times G, plus sample.

    Source: Karine-Huang/T2I-CompBench; each of its scripts writes such a file, 3_in_1_eval/3_in_1.py among them.

    Args:
        folder: with a folder for each category, as `python -m stage.benchmarks.official` makes it.
        results: category to the file in its folder.

    Raises:
        FileNotFoundError: a file is not there; says which script writes such files.
    """

    def __init__(self, folder: str | None, results: Mapping[str, str]) -> None:
        if folder is None:
            raise FileNotFoundError(
                "the official scripts have run in some folder: give benchmark.scorer.folder=FOLDER, which `python -m "
                "stage.benchmarks.official IMAGES FOLDER` lays out for them"
            )
        files = {name: Path(folder).expanduser() / name / file for name, file in results.items()}
        gone = [str(file) for file in files.values() if not file.is_file()]
        if gone:
            raise FileNotFoundError(
                f"every category has its result, {len(gone)} of {len(files)} are not there: {', '.join(gone)}; run "
                "T2I-CompBench's scripts there, or leave the categories out of scorer.results and of the paths"
            )
        self.answers = {name: _answers(file) for name, file in files.items()}
        self.prompts: Counter[str] = Counter()
        self.provenance: Mapping[str, Any] = {
            name: {"path": str(file), "sha256": sha256(file)} for name, file in files.items()
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt of a category without results; remembers how many prompts there are."""
        for prompt in prompts:
            if str(prompt.metadata.get("category")) not in self.answers or "line" not in prompt.metadata:
                raise ValueError(
                    f"results are of {', '.join(self.answers)}, {prompt.text!r} is of "
                    f"{prompt.metadata.get('category')!r}; read the lists with stage.benchmarks.compbench"
                )
        self.prompts = Counter(str(prompt.metadata["category"]) for prompt in prompts)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Images uint8 `[P, G, H, W, 3]`, which are not looked at, and P prompts to one part `[P, G, 1]`.

        Raises:
            ValueError: there are other than G results for each prompt of a category.
        """
        grid.check(images, prompts)
        group, values = images.shape[1], list[float]()
        for prompt in prompts:
            category = str(prompt.metadata["category"])
            answers, expected = self.answers[category], self.prompts[category] * group
            if set(answers) != set(range(expected)):
                raise ValueError(
                    f"there is one result for each of {expected} images of {category!r}, numbered from 0, got "
                    f"{len(answers)} up to {max(answers, default=-1)}; run its script again on all of them"
                )
            first = int(prompt.metadata["line"]) * group
            values += [answers[first + sample] for sample in range(group)]
        reasons = [f"official {value:.4f}" for value in values]
        return grid.fold(
            torch.tensor(values), images, prompts, reasons, (-1.0, 1.0), "t2i_compbench_official"
        )


def _answers(file: Path) -> dict[int, float]:
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
        found = {int(line["question_id"]): float(line["answer"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} must list question_id and answer of images ({error!r}); write it again"
        ) from error
    if len(found) != len(lines) or not all(math.isfinite(value) for value in found.values()):
        raise ValueError(f"{file} must have one finite answer an image; run its script again")
    return found
