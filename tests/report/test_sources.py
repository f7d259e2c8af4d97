"""Runs of wandb's server, as its client hands them over, and sources that hold no run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from stage.report.ablation import ablate
from stage.report.sources import read_sources
from tests.report.example import write_config, write_metrics


class Server:
    """What `wandb.Api()` offers of two runs; a real server answers the same two calls."""

    def __init__(self, history: list[dict[str, Any]]) -> None:
        self.found = [
            SimpleNamespace(
                name=f"run {seed}",
                id=str(seed),
                url=f"https://wandb.example/me/stage/runs/{seed}",
                config={
                    "seed": seed,
                    "updates": 2,
                    "algorithm": {"beta": 0.01},
                    "_wandb": {},
                    "reward_record": {},
                },
                scan_history=lambda: iter(history),
            )
            for seed in (1, 2)
        ]

    def runs(self, path: str) -> list[Any]:
        assert path == "me/stage"
        return self.found

    def run(self, path: str) -> Any:
        if path != "me/stage/2":
            raise ValueError(f"Could not find run <Run {path} (not found)>")
        return self.found[1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "trainer/global_step": 1,
            "_step": 0,
            "reward/mean": 0.5,
            "images/grid": {"_type": "images/separated"},
        },
        {"trainer/global_step": 2, "_step": 1, "reward/mean": 0.75, "policy/kl": "NaN"},
    ]
    monkeypatch.setattr(wandb, "Api", lambda: Server(rows))


@pytest.mark.usefixtures("server")
def test_the_runs_of_a_project_and_one_of_them() -> None:
    both, clashes = read_sources(["wandb:me/stage"])
    assert [run.name for run in both] == ["run 1", "run 2"] and not clashes
    (one,), _ = read_sources(["wandb:me/stage/2"])
    assert one.config == {"seed": 2, "updates": 2, "algorithm": {"beta": 0.01}}
    assert one.curves["reward/mean"].y.tolist() == [0.5, 0.75] and set(one.curves) == {"reward/mean"}
    assert one.not_finite == ("policy/kl", 2)


@pytest.mark.usefixtures("server")
def test_a_run_that_is_not_there_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"could not read me/stage/7 \(Could not find.*wandb login"):
        read_sources(["wandb:me/stage/7"])
    with pytest.raises(ValueError, match="ENTITY/PROJECT/ID"):
        read_sources(["wandb:stage"])


@pytest.mark.usefixtures("server")
def test_online_runs_and_folders_stand_in_one_table(tmp_path: Path) -> None:
    write_metrics(tmp_path / "mine")
    write_config(tmp_path / "mine", "grpo", 1)
    found = ablate(["wandb:me/stage", str(tmp_path / "mine")], "grpo")
    assert len(found.variants) == 2 and found.variants[0].label == "grpo"
    assert sorted(seed for variant in found.variants for seed in variant.seeds) == [1, 1, 2]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds neither"):
        read_sources([str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="needs a folder"):
        read_sources([str(tmp_path / "missing")])


def test_a_damaged_record_of_the_code_is_named(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    (tmp_path / "code.json").write_text(json.dumps([{}])[:-1])
    with pytest.raises(ValueError, match=r"code\.json is damaged"):
        read_sources([str(tmp_path)])
