"""Run folders written by hand: metrics, configuration, pictures and results.json, as the programs leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

METRICS = ("reward/mean", "policy/kl", "policy/entropy", "reference/entropy", "validation/strict")
FLAGS = {"grpo": (False, False, 0.0), "stage": (True, True, 0.4)}
PROMPTS = (
    ("colors", "a red ring"),
    ("colors", "a blue ring"),
    ("counting", "two rings"),
    ("counting", "three rings"),
)


def write_metrics(folder: Path, updates: int = 30, lift: float = 0.1) -> None:
    """Validation at updates 0 and 10 and so on, everything else at every update from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [",".join(("update", *METRICS)), "0,,,,,0.5"]
    for update in range(1, updates + 1):
        share = update / updates
        cells = [0.6 + lift * share, 0.1 * share, 2 - share / 2, 2 - share / 4]
        validation = str(0.5 + lift * share) if update % 10 == 0 else ""
        rows.append(",".join([str(update), *(f"{cell:.6f}" for cell in cells), validation]))
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")


def write_config(folder: Path, algorithm: str = "stage", seed: int = 0, **changed: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    advantage, kl, entropy = FLAGS[algorithm]
    config = {
        "seed": seed,
        "output": str(folder),
        "updates": 30,
        "algorithm": {"reweight_advantage": advantage, "reweight_kl": kl, "entropy_coefficient": entropy},
        "optimizer": {"lr": 1e-4},
        "data": {"seed": seed},
        "trainer": {"default_root_dir": str(folder)},
        **changed,
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")


def entry(
    mean: float, low: float | None = None, high: float | None = None, prompts: int = 2
) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "prompts": prompts}


def write_results(
    folder: Path,
    tuned: Mapping[str, float] | None = None,
    base: float = 0.5,
    prompts: tuple[tuple[str, str], ...] = PROMPTS,
    reason: str = "wrong: no ring",
    **changed: Any,
) -> None:
    """results.json and its pictures: of each prompt the base is wrong, and tuned right for every other one.

    `tuned` gives the overall score of a split; None leaves the base alone.
    """
    images, tables = [], {}
    roles = ["base"] if tuned is None else ["base", "tuned"]
    for split in ("validation", "heldout"):
        row = {"base": entry(base, base - 0.1, base + 0.1)}
        if tuned is not None:
            gain = tuned[split] - base
            row["tuned"] = entry(tuned[split], tuned[split] - 0.1, tuned[split] + 0.1)
            row["difference"] = entry(gain, gain - 0.05, gain + 0.05)
        tasks = [*dict.fromkeys(task for task, _ in prompts), "overall"]
        tables[split] = {part: {task: row for task in tasks} for part in ("partial", "strict")}
        for role in roles:
            for index, (task, prompt) in enumerate(prompts):
                right = float(role == "tuned" and index % 2 == 0)
                file = Path(split) / "images" / f"{role}{index:05d}_0.png"
                write_picture(folder / file, index * 40 + 20 * (role == "tuned"))
                images.append(
                    {
                        "model": role,
                        "split": split,
                        "file": file.as_posix(),
                        "prompt": prompt,
                        "prompt_id": index,
                        "index": index,
                        "sample": 0,
                        "task": task,
                        "parts": {"partial": 0.5, "strict": right},
                        "reason": "as asked" if right else reason,
                    }
                )
    results = {
        "format": 1,
        "benchmark": {"name": "shapes", "headline": "strict", "images_per_prompt": 1},
        "created": "2030-01-02T03:04:05+00:00",
        "command": "python evaluate.py checkpoint=last.ckpt",
        "models": {role: {"path": role, "sha256": role[0] * 64} for role in roles},
        "settings": {
            role: {"sampler": {"guidance_scale": 2.0, "temperature": 1.0}, "seed": 0} for role in roles
        },
        "config": {"checkpoint": "last.ckpt"},
        "trained_with": None,
        "versions": {"torch": "2"},
        "git": None,
        "timing": {},
        "scores": tables,
        "images": images,
        **changed,
    }
    (folder / "results.json").write_text(json.dumps(results))


def write_picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level % 256, np.uint8)).save(path)
