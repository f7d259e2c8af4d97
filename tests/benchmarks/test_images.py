"""Images on disk: the plan, what is missing, what is refused, and that nothing is ever half there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stage.benchmarks.images import ImageFolder, write_atomic
from tests.benchmarks.example import TEXTS, prompts

SETTINGS: dict[str, Any] = {"checkpoint": "a" * 64, "seed": 7, "sampler": {"guidance_scale": 2.0}}
PICTURE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


def folder(path: Path, images: int = 2, **settings: Any) -> ImageFolder:
    return ImageFolder(path, {**SETTINGS, **settings}, prompts(), images)


def started(path: Path) -> None:
    """One image is drawn."""
    images = folder(path)
    images.save(images.planned[0], PICTURE)


def test_the_manifest_says_what_every_image_is(tmp_path: Path) -> None:
    folder(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [
        f"images/{index:05d}_{sample}.png" for index in range(3) for sample in range(2)
    ]
    assert lines[3] == {
        "file": "images/00001_1.png",
        "index": 1,
        "prompt": "a photo of a green square",
        "prompt_id": prompts()[1].id,
        "sample": 1,
        "seed": 7,
        "checkpoint": "a" * 64,
        "metadata": {"tag": "colors", "prompt": "a photo of a green square"},
    }


def test_what_is_saved_is_loaded_and_no_longer_missing(tmp_path: Path) -> None:
    images = folder(tmp_path)
    assert images.missing() == images.planned
    images.save(images.planned[4], PICTURE)
    assert images.missing() == (*images.planned[:4], *images.planned[5:])
    np.testing.assert_array_equal(images.load(images.planned[4]), PICTURE)
    assert folder(tmp_path).missing() == images.missing()  # another process sees the same


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"checkpoint": "b" * 64}, '"checkpoint": "aaaa.*"checkpoint": "bbbb'),
        ({"seed": 8}, '"seed": 7.*"seed": 8'),
        ({"sampler": {"guidance_scale": 5.0}}, '"guidance_scale": 2.0.*"guidance_scale": 5.0'),
    ],
)
def test_images_of_other_settings_are_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    started(tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(ValueError, match=f"another evaluation .*settings.json.*{named}.*output=FOLDER"):
        folder(tmp_path, **changed)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_setting_that_is_off_is_one_that_an_older_version_did_not_know(tmp_path: Path) -> None:
    started(tmp_path)
    newer = {"guidance_scale": 2.0, "variation": None}
    assert len(folder(tmp_path, sampler=newer).missing()) == 5
    assert json.loads((tmp_path / "settings.json").read_text())["sampler"] == newer
    with pytest.raises(ValueError, match="another evaluation"):
        folder(tmp_path, sampler={**newer, "variation": 0.5})


def test_images_of_other_prompts_are_refused(tmp_path: Path) -> None:
    started(tmp_path)
    other = prompts((("colors", "a blue circle"), *TEXTS[1:]))
    with pytest.raises(ValueError, match=r"manifest.jsonl: .*a red circle.* has .*a blue circle"):
        ImageFolder(tmp_path, SETTINGS, other, 2)


def test_a_quick_look_is_extended_and_nothing_is_forgotten(tmp_path: Path) -> None:
    first = folder(tmp_path, images=1)
    for item in first.planned:
        first.save(item, PICTURE)
    more = folder(tmp_path, images=3)
    assert [item.file for item in more.missing()] == [
        f"images/{index:05d}_{sample}.png" for index in range(3) for sample in (1, 2)
    ]
    for item in more.missing():
        more.save(item, PICTURE)
    assert folder(tmp_path, images=2).missing() == ()
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 9  # also of what is not planned now
    assert folder(tmp_path, images=3).missing() == ()


def test_a_manifest_that_does_not_say_what_an_image_is(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / "images" / "somebody.png").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"manifest.jsonl does not say what somebody.png is"):
        folder(tmp_path)
    (tmp_path / "images" / "somebody.png").unlink()
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:500])
    with pytest.raises(ValueError, match=r"manifest.jsonl:2 is no line of a manifest"):
        folder(tmp_path)


def test_a_plan_without_images_binds_nobody(tmp_path: Path) -> None:
    folder(tmp_path)
    assert folder(tmp_path, images=1, seed=8).planned[0].seed == 8
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 3


def test_a_folder_of_unknown_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00000_0.png").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"there is no settings\.json that says what they are"):
        folder(tmp_path)
    assert not (tmp_path / "settings.json").exists()


def test_a_damaged_image_is_named_with_the_remedy(tmp_path: Path) -> None:
    images = folder(tmp_path)
    images.save(images.planned[0], PICTURE)
    path = tmp_path / images.planned[0].file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"00000_0.png is not .*delete it and run the same command again"):
        images.load(images.planned[0])
    with pytest.raises(ValueError, match=r"00000_1.png is not"):
        images.load(images.planned[1])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(tmp_path)
    path = tmp_path / images.planned[0].file
    seen = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        seen.append((path.exists(), Path(source).stat().st_size))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    images.save(images.planned[0], PICTURE)
    assert seen == [(False, path.stat().st_size)]
