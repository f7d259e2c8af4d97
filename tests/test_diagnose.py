"""The command: a rollout of the embedded base, its counts, maps and words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stage.diagnose import check, spread_prompts, switched
from stage.types import Prompt


def command(root: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "stage.diagnose", "device=cpu", *words]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_embedded_base(root: Path, tmp_path: Path) -> None:
    done = command(root, tmp_path, "prompts=3", "group_size=4", "maps=2", "gradients=true", "output=out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "diagnosis in out"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "conflict.png",
        "maps_1.png",
        "maps_2.png",
        "diagnosis.md",
        "diagnosis.json",
    }
    found = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert sum(found["conflict"]["pairs"]) == 3 * 6 * 36
    assert -1 <= found["gradients"]["cosine_of_sums"] <= 1 and found["gradients"]["parameters"] > 1_000_000
    assert 0 < found["pull"]["moved"] < 1
    text = (tmp_path / "out" / "diagnosis.md").read_text()
    assert "of all pairs are one token drawn twice" in text and "| with weights |" in text


def test_a_mistake_is_one_line(root: Path, tmp_path: Path) -> None:
    done = command(root, tmp_path, "group_size=1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: group_size must be a whole number of at least 2; got 1")


@pytest.mark.parametrize(("name", "value"), [("prompts", 0), ("maps", -1), ("group_size", True)])
def test_numbers_that_no_rollout_can_have(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
        check({"prompts": 1, "group_size": 2, "maps": 0, name: value})


def test_the_weights_are_switched_and_nothing_else() -> None:
    algorithm = {
        "beta": 0.01,
        "reweight_advantage": True,
        "reweight_kl": False,
        "clip_low": 0.2,
        "micro_batch": 4,
    }
    on, off = switched(algorithm, True), switched(algorithm, False)
    assert (on["reweight_advantage"], on["reweight_kl"]) == (True, True)
    assert (off["reweight_advantage"], off["reweight_kl"]) == (False, False)
    assert on["clip_low"] == 0.2 and on["resampling_rounds"] == 0 and on["micro_batch"] is None
    assert switched({**algorithm, "beta": 0}, True)["reweight_kl"] is False  # no KL, nothing to weigh


def test_prompts_are_spread_over_the_list() -> None:
    prompts = tuple(Prompt(number, str(number)) for number in range(10))
    assert [prompt.id for prompt in spread_prompts(prompts, 4)] == [0, 2, 5, 7]
    assert len(spread_prompts(prompts, 99)) == 10
