"""Verdicts on disk: scoring goes on where it stopped, shares add up to the whole, and nothing stale is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torch import Tensor

from stage.benchmarks.benchmark import Benchmark
from stage.benchmarks.evaluation import Candidate, open_folders
from stage.benchmarks.judging import Judging
from stage.benchmarks.share import Share
from stage.policy.janus import JanusPolicy
from stage.types import Prompt, Scores
from tests.benchmarks.example import Bright, benchmark

QUIET = Console(quiet=True)


class Counting(Bright):
    """Counts prompts that it judged, and stops before it would judge more than `most`."""

    def __init__(self, most: int = 1000) -> None:
        super().__init__()
        self.most, self.judged = most, list[str]()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        if len(self.judged) + len(prompts) > self.most:
            raise KeyboardInterrupt
        self.judged += [prompt.text for prompt in prompts]
        return super().__call__(images, prompts)


def no_weights() -> JanusPolicy:
    raise AssertionError("the images are there")


def bench(scorer: Bright) -> Benchmark:
    made = benchmark(2)
    object.__setattr__(made, "scorer", scorer)
    return made


def judging(path: Path, scorer: Bright, settings: Any = None) -> Judging:
    """Over a folder of noise, drawn once."""
    item = Candidate("base", path, {"checkpoint": "c", "seed": 1}, {}, no_weights)
    folders = open_folders(item, bench(scorer), ["validation"])
    for number, line in enumerate(folders["validation"].missing()):
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        folders["validation"].save(line, noise)
    return Judging(item, folders, bench(scorer), settings)


def test_scoring_goes_on_where_it_was_stopped_and_judges_nothing_twice(tmp_path: Path) -> None:
    first, second, whole = Counting(most=2), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        judging(tmp_path / "a", first).score(batch_size=2, console=QUIET)
    again = judging(tmp_path / "a", second)
    assert again.missing() == 2  # images of one prompt of three
    assert again.score(batch_size=2, console=QUIET) == 2
    assert len(first.judged) == 2 and not set(first.judged) & set(second.judged)
    assert judging(tmp_path / "a", Counting(most=0)).score(batch_size=2, console=QUIET) == 0
    straight = judging(tmp_path / "b", whole)
    straight.score(batch_size=6, console=QUIET)
    assert [line.verdict for line in again.collect()] == [line.verdict for line in straight.collect()]


def test_two_processes_share_the_prompts_and_one_collects(tmp_path: Path) -> None:
    scorers = [Counting(), Counting()]
    for rank, scorer in enumerate(scorers):
        judging(tmp_path, scorer).score(batch_size=2, console=QUIET, share=Share(rank, 2))
    assert [len(scorer.judged) for scorer in scorers] == [2, 1]
    assert not set(scorers[0].judged) & set(scorers[1].judged)
    assert len(judging(tmp_path, Counting()).collect()) == 6


def test_another_scorer_or_other_settings_judge_anew(tmp_path: Path) -> None:
    judging(tmp_path, Counting(), {"threshold": 0.3}).score(batch_size=2, console=QUIET)
    assert judging(tmp_path, Counting(), {"threshold": 0.3}).missing() == 0
    assert judging(tmp_path, Counting(), {"threshold": 0.4}).missing() == 6
    assert judging(tmp_path, Bright(), {"threshold": 0.3}).missing() == 6
    weighed = Counting()
    weighed.provenance = {"sha256": {"weights.pt": "1"}}  # type: ignore[attr-defined]
    assert judging(tmp_path, weighed, {"threshold": 0.3}).missing() == 6


def test_an_image_that_was_replaced_is_judged_anew_or_refused(tmp_path: Path) -> None:
    made = judging(tmp_path, Counting())
    made.score(batch_size=2, console=QUIET)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "validation" / "images" / "00001_0.png")
    with pytest.raises(ValueError, match=r"those of 1 prompts of base in .* have changed or are not judged"):
        made.collect()
    scorer = Counting()
    again = judging(tmp_path, scorer)
    assert again.score(batch_size=2, console=QUIET) == 2 and len(scorer.judged) == 1
    assert [line.verdict.parts["partial"] for line in again.collect()][2] == 0


def test_faults_of_a_folder_are_counted_before_anything_is_scored(tmp_path: Path) -> None:
    scorer = Counting()
    made = judging(tmp_path, scorer)
    images = tmp_path / "validation" / "images"
    (images / "00000_0.png").unlink()
    for name in ("00000_1.png", "00001_0.png"):
        (images / name).write_bytes((images / name).read_bytes()[:50])
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "00002_1.png")
    said = (
        r"must hold 6 readable images of one size, got 1 missing \(images/00000_0.png\); 2 damaged "
        r"\(images/00000_1.png, images/00001_0.png\); 1 of another size \(images/00002_1.png\)\. Nothing was scored"
    )
    with pytest.raises(ValueError, match=said):
        made.score(batch_size=2, console=QUIET)
    assert scorer.judged == []


def test_a_damaged_verdict_is_named_with_the_remedy(tmp_path: Path) -> None:
    made = judging(tmp_path, Counting())
    made.score(batch_size=2, console=QUIET)
    (file,) = tmp_path.glob("validation/verdicts/*/00002.json")
    file.write_text(file.read_text()[:30])
    with pytest.raises(ValueError, match=r"00002.json is no file of verdicts .*delete it to score"):
        made.collect()
