"""The measured evaluation draws what it says, to files, and its scorers run on small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stage.benchmarks.images import ImageFolder
from stage.speed.__main__ import main
from stage.speed.evaluation import (
    GROUP,
    OBJECTS,
    _settings,
    build_detector,
    drawing_row,
    measure_drawing,
    prompts,
)
from stage.speed.models import PROMPT_TOKENS, build_policy

CPU = torch.device("cpu")


def test_all_images_end_on_disk_and_the_seconds_are_told_apart(tmp_path: Path) -> None:
    policy = build_policy("tiny", CPU, torch.float32).requires_grad_(False).eval()
    row = drawing_row(policy, "tiny", 24, 16, tmp_path)
    assert ImageFolder(tmp_path / "tiny", _settings("tiny"), prompts(6), GROUP).missing() == ()
    assert len(list((tmp_path / "tiny" / "images").iterdir())) == 24
    seconds, sampling, other = (float(row[key]) for key in ("seconds", "sampling_seconds", "other_seconds"))
    assert 0 < sampling < seconds and sampling + other == pytest.approx(seconds)
    assert row["images_per_second"] == pytest.approx(24 / seconds)


def test_prompts_differ_and_have_one_length() -> None:
    texts = [prompt.text for prompt in prompts(553)]
    assert len(set(texts)) == 553 and {len(text.split()) for text in texts} == {PROMPT_TOKENS - 2}


def test_the_detector_looks_at_every_image(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="the extra `geneval` is not installed")
    detector = build_detector(tmp_path, "cpu", "float32", tiny=True)
    found = detector.detect(torch.randint(0, 256, (3, 48, 48, 3), dtype=torch.uint8).numpy())
    assert [sum(map(len, one.values())) for one in found] == [OBJECTS] * 3


def test_the_command_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip", reason="the extra `geneval` is not installed")
    arguments = [
        "--evaluation",
        "8",
        "--evaluation-batch",
        "8",
        "--evaluation-scored",
        "8",
        "--models",
        "tiny",
        "--device",
        "cpu",
    ]
    main([*arguments, "--output", str(tmp_path / "evaluation")])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["model"] for row in found["evaluation"]] == ["tiny"]
    assert [row["scorer"] for row in found["scorers"]] == ["mask2former swin-s", "clip vit-l-14"]
    assert "## scorers" in capsys.readouterr().out


def test_numbers_that_are_no_whole_prompts_are_refused() -> None:
    for images, batch in ((10, 4), (8, 6), (8, 16), (0, 0)):
        with pytest.raises(ValueError, match="multiples of 4"):
            measure_drawing(["tiny"], images, batch, CPU, torch.float32)
