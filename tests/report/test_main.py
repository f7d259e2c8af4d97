"""`python -m stage.report` from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stage.report.__main__ import main
from tests.report.example import write_config, write_metrics

ROOT = Path(__file__).resolve().parents[2]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path)
    main([str(tmp_path)])
    assert capsys.readouterr().out == f"page in {tmp_path / 'report.html'}\n"


def test_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_metrics(tmp_path / str(seed))
        write_config(tmp_path / str(seed), seed=seed)
    main(["compare", str(tmp_path / "0"), str(tmp_path / "1"), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"page in {tmp_path / 'out' / 'report.html'}\n"
    assert (tmp_path / "out" / "report.md").is_file()


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stage.report", str(tmp_path / "nowhere")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == f"error: a report needs a folder; {tmp_path / 'nowhere'} is none. Give the folder of a run.\n"
    )
