"""Images out to T2I-CompBench's scripts and their results back in, image by image."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stage.benchmarks.images import ImageFolder
from stage.benchmarks.official import lay_out_official, main
from stage.rewards.official_compbench import OfficialCompBench
from stage.types import Prompt
from tests.benchmarks.example import prompts

GROUP = 2
RESULT = "annotation_blip/vqa_result.json"


def listed() -> tuple[Prompt, ...]:
    """Two colours and a shape, with their lines."""
    places = (("color", 0), ("color", 1), ("shape", 0))
    return tuple(
        replace(prompt, metadata={"category": category, "line": line})
        for prompt, (category, line) in zip(prompts(), places, strict=True)
    )


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = ImageFolder(tmp_path / "val", {"checkpoint": "c" * 64, "seed": 3}, listed(), GROUP)
    for number, item in enumerate(folder.planned):
        folder.save(item, np.full((4, 4, 3), number, np.uint8))
    return folder.folder


def test_the_layout_of_the_scripts(images: Path, tmp_path: Path) -> None:
    assert lay_out_official(images, tmp_path / "out") == {"color": 4, "shape": 2}
    names = sorted(
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")
    )
    assert names == [
        "color/samples/a photo of a green square_000002.png",
        "color/samples/a photo of a green square_000003.png",
        "color/samples/a red circle_000000.png",
        "color/samples/a red circle_000001.png",
        "shape/samples/two blue triangle_000000.png",
        "shape/samples/two blue triangle_000001.png",
    ]
    there = tmp_path / "out" / "color" / "samples" / "a photo of a green square_000003.png"
    assert there.read_bytes() == (images / "images" / "00001_1.png").read_bytes()


def written(folder: Path, category: str, answers: list[float]) -> None:
    file = folder / category / RESULT
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"question_id": number, "answer": f"{value:.4f}"} for number, value in enumerate(answers)]
    file.write_text(json.dumps(lines[::-1]))  # the order of the file says nothing


def test_results_come_back_to_their_images(tmp_path: Path) -> None:
    written(tmp_path, "color", [0.1, 0.2, 0.3, 0.4])
    written(tmp_path, "shape", [0.5, 0.6])
    scorer = OfficialCompBench(str(tmp_path), {"color": RESULT, "shape": RESULT})
    scorer.check(listed())
    pictures = torch.zeros(3, GROUP, 4, 4, 3, dtype=torch.uint8)
    found = scorer(pictures, listed()).parts[..., 0]
    torch.testing.assert_close(found, torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]))
    mixed = scorer(pictures[:2], listed()[1:]).parts[..., 0]
    torch.testing.assert_close(mixed, torch.tensor([[0.3, 0.4], [0.5, 0.6]]))
    assert len(scorer.provenance["color"]["sha256"]) == 64
    written(tmp_path, "shape", [0.5])
    fewer = OfficialCompBench(str(tmp_path), {"color": RESULT, "shape": RESULT})
    fewer.check(listed())
    with pytest.raises(
        ValueError, match="one result for each of 2 images of 'shape', numbered from 0, got 1"
    ):
        fewer(pictures, listed())


def test_what_is_missing_is_said(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"benchmark\.scorer\.folder=FOLDER"):
        OfficialCompBench(None, {})
    with pytest.raises(FileNotFoundError, match="1 of 1 are not there"):
        OfficialCompBench(str(tmp_path), {"color": RESULT})
    with pytest.raises(SystemExit, match="has none; give such a folder"):
        main([str(tmp_path), str(tmp_path / "out")])
    (images / "images" / "00000_1.png").unlink()
    with pytest.raises(SystemExit, match=r"1 of 6 images are missing .* first is images/00000_1.png"):
        main([str(images), str(tmp_path / "out")])
    shutil.rmtree(images)
    ImageFolder(images, {"checkpoint": "c" * 64, "seed": 3}, prompts()[:1], 1).save(
        ImageFolder(images, {"checkpoint": "c" * 64, "seed": 3}, prompts()[:1], 1).planned[0],
        np.zeros((4, 4, 3), np.uint8),
    )
    with pytest.raises(SystemExit, match="each needs its category and line"):
        main([str(images), str(tmp_path / "out")])
