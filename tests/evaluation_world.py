"""A base model, a training run with a checkpoint, prompts and a small configuration, for the tests of the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from stage import launch
from stage.policy.janus import load_policy
from stage.training_checkpoint import POLICY, trained_names, weights_sha256
from tests.benchmarks.example import PLAIN, TEXTS
from tests.policy.tiny_model import build_tiny_janus
from tests.tiny_training import FROZEN

CONF = Path(__file__).resolve().parents[1] / "conf"
SAMPLER = {"_target_": "stage.policy.sampler.Sampler", "guidance_scale": 2.0, "temperature": 1.0}


@dataclass(frozen=True)
class World:
    """Folders of a small world; `groups` holds model=small, sampler=small and benchmark=small."""

    root: Path
    base: Path
    run: Path
    groups: Path

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"

    @property
    def arguments(self) -> list[str]:
        return ["--config-dir", str(self.groups), "model=small", "sampler=small", "device=cpu"]

    @property
    def evaluation(self) -> list[str]:
        return [*self.arguments, "benchmark=small", "batch_size=4", "intervals.resamples=200"]


def make_world(root: Path) -> World:
    world = World(root, build_tiny_janus(root / "base"), root / "run", root / "groups")
    prompts = [
        {"tag": tag, "include": [{"class": "circle", "count": 1}], "prompt": text} for tag, text in TEXTS
    ]
    for split, lines in (("validation", prompts), ("heldout", prompts[:2])):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark = {
        "_target_": "stage.benchmarks.shapes.ShapesBenchmark",
        "_convert_": "all",
        "name": "shapes",  # whose results lie directly in the folder of the model
        "splits": {
            split: {"_target_": "stage.data.read_prompts", "path": str(root / f"{split}.jsonl")}
            for split in ("validation", "heldout")
        },
        "images_per_prompt": 2,
        "scorer": {"_target_": "tests.benchmarks.example.Bright", "threshold": 0.5},
        "headline": "strict",
        "beside": ["partial"],
    }
    for group, node in (("model", model(world)), ("sampler", SAMPLER), ("benchmark", benchmark)):
        (world.groups / group).mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(node), world.groups / group / "small.yaml")
    write_run(world)
    return world


def model(world: World) -> dict[str, Any]:
    return {
        "_target_": "stage.policy.janus.load_policy",
        "path": str(world.base),
        "template": {
            "_target_": "stage.policy.template.Template",
            "name": "plain",
            "prefix": "",
            "suffix": "",
        },
        "dtype": "float32",
        "freeze": list(FROZEN),
        "gradient_checkpointing": False,
    }


def write_run(world: World, seed: int = 0, **changed: Any) -> None:
    """A run folder as training leaves it: metrics, configuration and a checkpoint with other language weights."""
    policy = load_policy(str(world.base), PLAIN, "float32", list(FROZEN), False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():  # a tied weight is there once
            if parameter.requires_grad:
                parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
    state = policy.state_dict()
    trained = {POLICY + name: state[name] for name in sorted(trained_names(policy))}
    config = {
        "seed": seed,
        "output": str(world.run),
        "algorithm": {"reweight_advantage": True, "reweight_kl": True, "entropy_coefficient": 0.4},
        "model": model(world),
        "sampler": SAMPLER,
    }
    checkpoint = {
        "state_dict": trained,
        "update": 12,
        "config": config,
        "overrides": [],
        "base": {"path": str(world.base), "sha256": weights_sha256(world.base)},
        "random": {},
        **changed,
    }
    world.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, world.checkpoint)
    OmegaConf.save(OmegaConf.create(config), world.run / "config.yaml")
    rows = [f"{update},{0.5 + update / 100},{update / 200}" for update in range(1, 13)]
    (world.run / "metrics.csv").write_text("\n".join(["update,reward/mean,policy/kl", *rows]) + "\n")


def run_command(
    main: Callable[[], Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> str | int | None:
    """Run a command in this process as its own entry point does; what it gives to `sys.exit`, None for success."""
    # Hydra looks for conf/ beside a file that is run, but not beside one that a test has imported.
    monkeypatch.setattr("sys.argv", ["command.py", "--config-path", str(CONF), *arguments])
    monkeypatch.delenv(launch.FULL_ERROR, raising=False)
    try:
        launch.run(main)
    except SystemExit as stop:
        return stop.code
    return None
