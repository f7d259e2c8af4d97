"""The command itself: a mistake is one line, and two real runs are trained, evaluated, archived and reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = (
    "only=[grpo,stage]",
    "seeds=[1]",
    "updates=2",
    'train=["data.prompts_per_update=2","group_size=2","callbacks.images.samples=1","callbacks.validation=null"]',
    'evaluate=["splits=[heldout]","benchmark.images_per_prompt=1","intervals.resamples=100"]',
)


def command(root: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_mistake_is_one_line(root: Path, tmp_path: Path) -> None:
    found = command(root, tmp_path, "stage.pack", "only=[dapo]")
    assert found.returncode == 1 and not list(tmp_path.iterdir())
    assert found.stderr.startswith("error: only names variants; dapo is none of grpo, stage")


@pytest.mark.slow
def test_two_real_runs_become_a_report(root: Path, tmp_path: Path) -> None:
    first = command(root, tmp_path, "stage.pack", *QUICK, "device=cpu", "archive=a.tar.gz")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 of 2 runs done, 0 unfinished, 0 failed; in outputs/pack" in first.stdout
    folders = [f"outputs/pack/{variant}/seed_1" for variant in ("grpo", "stage")]
    again = command(root, tmp_path, "stage.pack", *QUICK, "device=cpu")
    assert again.returncode == 0
    assert (tmp_path / folders[0] / "console.log").read_text().count("$ ") == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = command(root, elsewhere, "stage.pack", *QUICK, "device=cpu", "restore=[../a.tar.gz]")
    assert moved.returncode == 0 and (elsewhere / folders[1] / "evaluation/last/results.json").is_file()
    report = command(root, elsewhere, "stage.report", "ablation", *folders, "--output", "report")
    assert report.returncode == 0, report.stderr
    text = (elsewhere / "report" / "report.md").read_text()
    assert "| grpo | 1 |" in text and "| stage | 1 |" in text and "## shapes, heldout: strict" in text
