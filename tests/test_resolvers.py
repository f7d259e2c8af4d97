"""What configurations compute: folders of runs and jobs, and where scorers run."""

from __future__ import annotations

from pathlib import Path

import torch

from stage import resolvers


def test_a_resumed_run_stays_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert resolvers.run_folder(str(folder / "last.ckpt"), "fresh") == "fresh"  # no such run
    folder.mkdir(parents=True)
    assert resolvers.run_folder(str(folder / "last.ckpt"), "fresh") == str(tmp_path / "run")
    assert resolvers.run_folder(str(tmp_path / "moved.ckpt"), "fresh") == "fresh"
    assert resolvers.run_folder(None, "fresh") == "fresh"


def test_a_job_of_a_sweep_has_a_folder_name() -> None:
    assert resolvers.job_folder("algorithm=grpo,model.path=/a/b") == "algorithm=grpo,model.path=_a_b"
    long = [resolvers.job_folder("x" * 1000 + end) for end in "ab"]
    assert all(len(name) <= 200 for name in long) and long[0] != long[1]


def test_scorers_run_where_the_evaluation_does() -> None:
    assert [resolvers.scorers_on(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    assert resolvers.scorers_on("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
