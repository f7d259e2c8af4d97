"""Images of other programs: each layout, and everything that can be wrong with a folder, with counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage.benchmarks.images import ImageFolder
from stage.benchmarks.outside import OutsideFolder
from stage.types import Prompt
from tests.benchmarks.example import prompts

GROUP = 2


def paint(path: Path, level: int, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)


def level(index: int, sample: int) -> int:
    return 40 * index + 10 * sample


def geneval(folder: Path) -> None:
    for index, prompt in enumerate(prompts()):
        for sample in range(GROUP):
            paint(folder / f"{index:05d}" / "samples" / f"{sample:04d}.png", level(index, sample))
        (folder / f"{index:05d}" / "metadata.jsonl").write_text(json.dumps(dict(prompt.metadata)) + "\n")
        paint(folder / f"{index:05d}" / "grid.png", 255)  # as the official program leaves it


def compbench(folder: Path) -> None:
    for index, prompt in enumerate(prompts()):
        for sample in range(GROUP):
            # Numbered through, as the official program does it; the release counts within a prompt.
            paint(
                folder / "samples" / f"{prompt.text}_{index * GROUP + sample:06d}.png", level(index, sample)
            )


def flat(folder: Path) -> None:
    for index in range(3):
        for sample in range(GROUP):
            paint(folder / f"{index * GROUP + sample:05d}.png", level(index, sample))


def own(folder: Path) -> None:
    mine = ImageFolder(folder, {"checkpoint": "c" * 64, "seed": 3}, prompts(), GROUP)
    for item in mine.planned:
        mine.save(item, np.full((8, 8, 3), level(item.index, item.sample), np.uint8))


def opened(folder: Path, images: int = GROUP, listed: tuple[Prompt, ...] | None = None) -> OutsideFolder:
    chosen = prompts() if listed is None else listed
    return OutsideFolder(folder, chosen, images, [str(prompt.metadata["tag"]) for prompt in chosen])


LAYOUTS = (geneval, compbench, flat, own)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_found_in_its_place(layout: Callable[[Path], None], tmp_path: Path) -> None:
    layout(tmp_path)
    found = opened(tmp_path)
    assert [(item.index, item.sample) for item in found.planned] == [(i, s) for i in range(3) for s in (0, 1)]
    assert [int(found.load(item)[0, 0, 0]) for item in found.planned] == [0, 10, 40, 50, 80, 90]
    assert [item.prompt for item in found.planned] == [p.text for p in prompts() for _ in range(GROUP)]
    assert found.missing() == () and found.load_plan(found.planned[0]) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_faults_are_counted_at_once(layout: Callable[[Path], None], tmp_path: Path) -> None:
    layout(tmp_path)
    pictures = [path for path in sorted(tmp_path.rglob("*.png")) if path.name != "grid.png"]
    pictures[0].unlink()
    pictures[3].write_bytes(pictures[3].read_bytes()[:60])
    paint(pictures[5].with_name("mine-at-home.png"), 0)
    with pytest.raises(ValueError) as error:
        opened(tmp_path)
    text = str(error.value)
    assert "must hold 6 images, 2 for each of 3 prompts" in text and "Nothing was scored" in text
    assert "1 missing" in text and "1 damaged" in text
    assert "1 not named by" in text or "1 not in the manifest (mine-at-home.png)" in text


def test_more_images_than_planned(tmp_path: Path) -> None:
    flat(tmp_path)
    for number in range(6, 11):
        paint(tmp_path / f"{number:05d}.png", 0)
    with pytest.raises(ValueError, match=r"5 more than planned \(00006.png, 00007.png, 00008.png, \.\.\.\)"):
        opened(tmp_path)


def test_another_number_of_each_is_said_with_its_setting(tmp_path: Path) -> None:
    geneval(tmp_path)
    with pytest.raises(
        ValueError, match=r"2 images of each prompt, the benchmark has 4; set benchmark.images_per_prompt"
    ):
        opened(tmp_path, images=4)


def test_metadata_of_another_prompt(tmp_path: Path) -> None:
    geneval(tmp_path)
    line = {**prompts()[1].metadata, "tag": "counting"}
    (tmp_path / "00001" / "metadata.jsonl").write_text(json.dumps(line))
    (tmp_path / "00002" / "metadata.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"1 of another prompt \(00001 has tag 'counting', the list 'colors'\)"
    ):
        opened(tmp_path)
    with pytest.raises(ValueError, match="1 without readable metadata"):
        opened(tmp_path)


def test_own_images_of_another_list(tmp_path: Path) -> None:
    own(tmp_path)
    other = prompts((("colors", "a blue circle"), ("colors", "a photo of a green square"), ("a", "b")))
    with pytest.raises(ValueError, match=r"4 of another prompt \(00000_0.png shows 'a red circle'"):
        opened(tmp_path, listed=other)


def test_own_images_of_two_checkpoints(tmp_path: Path) -> None:
    """As after copying images of another evaluation between those of this one."""
    own(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    for line in lines[:2]:
        line["checkpoint"] = "d" * 64
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = r"2 of another checkpoint \(00000_0.png of dddddddd, 00000_1.png of dddddddd\)"
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)


def test_images_of_several_sizes(tmp_path: Path) -> None:
    flat(tmp_path)
    paint(tmp_path / "00003.png", 0, side=16)
    with pytest.raises(ValueError, match=r"of another size \(5 of 8 x 8, 1 of 16 x 16\)"):
        opened(tmp_path)


def test_a_folder_for_each_row(tmp_path: Path) -> None:
    """As the release leaves HPSv2's styles and T2I-CompBench's categories."""
    for number in range(4):
        paint(tmp_path / "colors" / f"{number:05d}.png", number)
    for number in range(2):
        paint(tmp_path / "counting_val" / "samples" / f"{prompts()[2].text}_{number:05d}.png", 100 + number)
    assert [int(opened(tmp_path).load(item)[0, 0, 0]) for item in opened(tmp_path).planned] == [
        0, 1, 2, 3, 100, 101,
    ]  # fmt: skip
    paint(tmp_path / "colors" / "00004.png", 0)
    with pytest.raises(ValueError, match=r"1 more than planned \(colors/00004.png\)"):
        opened(tmp_path)


def test_a_prompt_that_no_file_name_holds_as_it_is(tmp_path: Path) -> None:
    listed = (Prompt(1, "a cup and/or a bowl.", {"tag": "x"}),)
    paint(tmp_path / "a cup and_or a bowl_000000.png", 7)
    assert opened(tmp_path, 1, listed).planned[0].file == "a cup and_or a bowl_000000.png"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is none; check the path"):
        opened(tmp_path / "nowhere")


def test_the_hash_is_of_the_pictures(tmp_path: Path) -> None:
    flat(tmp_path)
    first = opened(tmp_path).sha256
    assert opened(tmp_path).sha256 == first
    paint(tmp_path / "00003.png", 1)
    assert opened(tmp_path).sha256 != first


def test_what_geneval_lacks_is_named_by_its_number(tmp_path: Path) -> None:
    geneval(tmp_path)
    (tmp_path / "00000" / "samples" / "0001.png").unlink()
    (tmp_path / "00002" / "samples" / "0000.png").rename(tmp_path / "00002" / "samples" / "0004.png")
    # The others count from zero, so the last folder does too, and lacks its first.
    missing = (
        r"2 missing \(image 1 of line 0, .*image 0 of line 2, .*\); 1 more than planned \(00002/samples/0004"
    )
    with pytest.raises(ValueError, match=missing):
        OutsideFolder(tmp_path, prompts(), GROUP, ["a", "b", "c"])


def test_geneval_may_count_from_one(tmp_path: Path) -> None:
    geneval(tmp_path)
    for number in (1, 0):
        for place in tmp_path.glob("0*/samples"):
            (place / f"{number:04d}.png").rename(place / f"{number + 1:04d}.png")
    found = OutsideFolder(tmp_path, prompts(), GROUP, ["a", "b", "c"])
    assert [int(found.load(item).mean()) for item in found.planned] == [
        level(index, sample) for index in range(3) for sample in range(GROUP)
    ]


def test_a_truncated_jpeg_is_damaged(tmp_path: Path) -> None:
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{index:05d}.jpg")
    OutsideFolder(tmp_path, prompts(), GROUP, ["a", "b", "c"])
    file = tmp_path / "00003.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"1 damaged \(00003.jpg"):
        OutsideFolder(tmp_path, prompts(), GROUP, ["a", "b", "c"])
