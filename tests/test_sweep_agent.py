"""W&B's own programs work off a sweep: `wandb sweep` registers it, `wandb agent` starts training with its command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from stage.loggers import read_metrics
from tests.test_sweeps import SWEEPS, load
from tests.tiny_training import ROOT

pytest.importorskip("sweeps", reason="W&B's sweeps engine, which has its JSON schema, is not installed")

from tests.wandb_server import ENTITY, PROJECT, SWEEP, Server, served

# As little work as a run can be; the command of the sweep stands around it untouched.
SMALL = (
    *(
        "updates=1",
        "group_size=2",
        "data.prompts_per_update=1",
        "callbacks.images=null",
        "callbacks.validation=null",
    ),
    *("callbacks.checkpoints.monitor=reward/mean", "trainer.accelerator=cpu"),
)


@pytest.mark.slow
def test_an_agent_trains_what_a_sweep_says(tmp_path: Path) -> None:
    """Two arms and one seed of a real file with one update each, without an account."""
    sweep = load(SWEEPS / "vanilla_against_parts.yaml")
    sweep["parameters"] = {"experiment": {"values": ["tiny_grpo", "tiny_stage"]}, "seed": {"values": [3]}}
    sweep["program"] = str(ROOT / "train.py")
    place = sweep["command"].index("${args_no_hyphens}")
    sweep["command"][place:place] = SMALL
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with served() as server:
        assert f"wandb agent {ENTITY}/{PROJECT}/{SWEEP}" in wandb(server, tmp_path, "sweep", "sweep.yaml")
        output = wandb(server, tmp_path, "agent", f"{ENTITY}/{PROJECT}/{SWEEP}")
        assert [run.config["experiment"]["value"] for run in server.handed] == ["tiny_grpo", "tiny_stage"], (
            output
        )
    for run in server.handed:
        folder = tmp_path / "outputs" / "sweeps" / "vanilla_against_parts" / str(run.name)
        assert [row["update"] for row in read_metrics(folder / "metrics.csv")] == ["1"], output
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["seed"] == 3 and config["name"] == run.config["experiment"]["value"]
        logger = config["logger"]
        assert (logger["group"], logger["tags"]) == ("vanilla_against_parts", ["sweep", "parts"])
        assert logger["name"] == f"{config['name']}-{run.name}"
        (record,) = (folder / "wandb").glob("offline-run-*")
        assert record.name.endswith(f"-{run.name}")  # the id that the server gave it


def test_a_sweep_with_an_unknown_key_is_told_of(tmp_path: Path) -> None:
    """W&B's own check, which `wandb sweep` prints; the server of this test has the schema that the real one has."""
    sweep = load(SWEEPS / "lambda.yaml") | {"paramters": {}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with served() as server:
        output = wandb(server, tmp_path, "sweep", "sweep.yaml")
    assert "Malformed sweep config" in output and "paramters" in output


def wandb(server: Server, folder: Path, *words: str) -> str:
    """What W&B's command line says, with this server in place of theirs and runs kept offline."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB_")},
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder), "WANDB_MODE": "offline"},
        **{"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "NO_PROXY": "127.0.0.1"},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "wandb", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
