"""What is timed is the same work: a reward and its loop agree on small weights, and every image has boxes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stage.speed import sizes
from stage.speed.__main__ import main
from stage.speed.rewards import REWARDS, measure_reward
from stage.speed.scorers import DETECTIONS, pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_and_its_loop_agree(name: str, tmp_path: Path) -> None:
    if name == "hps":
        pytest.importorskip("open_clip", reason="the extra `geneval` is not installed")
    row = measure_reward(name, tmp_path, 16, CPU, tiny=True)
    # Pillow and torchvision round resized pixels alike but for one level of 255.
    assert float(row["largest_difference"]) < 1e-2
    assert row["times"] == pytest.approx(float(row["loop_seconds"]) / float(row["seconds"]))
    assert float(row["seconds"]) > 0 and row["images"] == 16
    if name == "gdino":
        assert float(row["fewest_boxes"]) >= DETECTIONS
    else:
        assert math.isnan(float(row["fewest_boxes"]))


def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rewards", "git", "--reward-images", "8", "--reward-shapes", "tiny", "--device", "cpu"]
    main([*arguments, "--output", str(tmp_path / "rewards")])
    (row,) = json.loads((tmp_path / "rewards.json").read_text())["rewards"]
    assert row["reward"] == "git" and row["images"] == 8
    assert "| git | 8 | float32 |" in (tmp_path / "rewards.md").read_text()
    assert "## rewards" in capsys.readouterr().out


def test_the_command_line_knows_the_rewards_that_are_measured() -> None:
    assert tuple(REWARDS) == sizes.REWARDS


def test_pictures_are_whole_groups() -> None:
    assert pictures(32, 16).shape == (4, 8, 16, 16, 3)
    for wrong in (0, 12, 40):
        with pytest.raises(ValueError, match=f"got {wrong}"):
            pictures(wrong, 16)


def test_no_configuration_library_is_needed() -> None:
    code = "import sys, stage.speed.__main__; print({'hydra', 'omegaconf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
