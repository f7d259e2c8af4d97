"""Images of another benchmark's folder: linked where settings, list and number are the same, and left where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage.benchmarks.adopt import adopt
from stage.benchmarks.images import ImageFolder, Planned
from stage.types import Prompt
from tests.benchmarks.example import prompts

SETTINGS: dict[str, Any] = {"checkpoint": "c", "seed": 1, "sampler": {"temperature": 1.0}, "split": "test"}


def folder(pool: Path, name: str, tokens: bool = False, images: int = 2, **changed: Any) -> ImageFolder:
    lines: tuple[Prompt, ...] = changed.pop("lines", prompts())
    return ImageFolder(pool / name / "test", {**SETTINGS, **changed}, lines, images, tokens)


def fill(found: ImageFolder) -> None:
    for number, item in enumerate(found.planned):
        save(found, item, number)


def save(found: ImageFolder, item: Planned, number: int) -> None:
    if item.tokens is not None:
        found.save_tokens(item, np.full(4, number))
    found.save(item, np.full((8, 8, 3), number, dtype=np.uint8))


def test_the_same_images_are_one_file(tmp_path: Path) -> None:
    drawn = folder(tmp_path, "drift", tokens=True)
    fill(drawn)
    mine = folder(tmp_path, "diversity", split="validation")  # whatever the split is called
    save(mine, mine.planned[0], 0)
    assert adopt(mine, tmp_path, mine.missing()) == 5 and not mine.missing()
    for number, item in enumerate(mine.planned):
        assert mine.load(item).max() == number
        same = (mine.folder / item.file).samefile(drawn.folder / item.file)
        assert same == (number > 0)
    assert not list(tmp_path.rglob("*.partial"))
    assert adopt(mine, tmp_path, mine.missing()) == 0


def test_a_share_is_only_of_what_was_asked_for(tmp_path: Path) -> None:
    fill(folder(tmp_path, "a"))
    mine = folder(tmp_path, "b")
    assert adopt(mine, tmp_path, mine.missing()[::2]) == 3 and len(mine.missing()) == 3


@pytest.mark.parametrize(
    "changed",
    [
        {"checkpoint": "d"},
        {"seed": 2},
        {"sampler": {"temperature": 0.9}},
        {"images": 1},
        {"lines": prompts()[:2]},
        {"lines": prompts()[::-1]},
        {"lines": tuple(replace(prompt, metadata={**prompt.metadata, "tag": "x"}) for prompt in prompts())},
    ],
)
def test_what_differs_in_anything_is_drawn(tmp_path: Path, changed: dict[str, Any]) -> None:
    fill(folder(tmp_path, "a"))
    mine = folder(tmp_path, "b", **changed)
    assert adopt(mine, tmp_path, mine.missing()) == 0 and not list((mine.folder / "images").iterdir())


def test_tokens_are_part_of_an_image_for_those_who_keep_them(tmp_path: Path) -> None:
    fill(folder(tmp_path, "diversity"))
    mine = folder(tmp_path, "drift", tokens=True)
    assert adopt(mine, tmp_path, mine.missing()) == 0
    fill(folder(tmp_path, "other", tokens=True))
    assert adopt(mine, tmp_path, mine.missing()) == 6
    assert [mine.load_tokens(item)[0] for item in mine.planned] == list(range(6))


def test_a_damaged_picture_is_not_passed_on(tmp_path: Path) -> None:
    drawn = folder(tmp_path, "a")
    fill(drawn)
    whole = (drawn.folder / drawn.planned[2].file).read_bytes()
    (drawn.folder / drawn.planned[2].file).write_bytes(whole[:-30])
    mine = folder(tmp_path, "b")
    assert adopt(mine, tmp_path, mine.missing()) == 5
    assert mine.missing() == (mine.planned[2],)


def test_a_stranger_in_the_pool_is_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger" / "test"
    stranger.mkdir(parents=True)
    (stranger / "settings.json").write_text("{")
    (stranger / "manifest.jsonl").write_text("")
    fill(folder(tmp_path, "a"))
    mine = folder(tmp_path, "b")
    assert adopt(mine, tmp_path, mine.missing()) == 6
