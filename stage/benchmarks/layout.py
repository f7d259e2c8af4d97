"""Where the images and results of an evaluation lie.

RUN/evaluation/best/results.json, report.html, validation/, heldout/    a checkpoint of a training run
RUN/evaluation/base-1a2b3c4d/validation/, heldout/                      its base, shared by the checkpoints of the run
outputs/evaluation/NAME-1a2b3c4d/                                       a model that is in no run folder

Other benchmarks than shapes have a folder of their own in each of these: RUN/evaluation/best/geneval/results.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stage.benchmarks.evaluation import Candidate
from stage.benchmarks.outside import OutsideFolder
from stage.policy.janus import JanusPolicy
from stage.subject import Subject

OUTPUTS = Path("outputs") / "evaluation"


def lay_out(
    models: Mapping[str, Subject],
    sampler: Mapping[str, Any],
    seed: int,
    device: torch.device,
    output: str | None,
    subfolder: str = "",
) -> list[Candidate]:
    """The models by role, each with its folder; results go into that of the last.

    Images of the base depend on its weights, the sampler and the seed, not on the checkpoint beside it. So its folder
    is named by them, and every checkpoint of a run finds them there.

    Args:
        models: `base` and, unless it stands alone, `tuned`.
        sampler: configuration of the sampler.
        output: folder that the user asked for, None for the default.
        subfolder: of the benchmark, inside the folder of the model.
    """
    settings = {role: subject.image_settings(sampler, seed) for role, subject in models.items()}
    folders = _folders(models, f"base-{_fingerprint(settings['base'])}", output)
    return [
        Candidate(
            role,
            folders[role] / subfolder,
            settings[role],
            subject.record(),
            partial(subject.load, device),
            folders[role] if subfolder else None,
        )
        for role, subject in models.items()
    ]


def lay_out_images(
    folders: Mapping[str, Mapping[str, OutsideFolder]],
    paths: Mapping[str, Path],
    output: str | None,
    subfolder: str,
) -> list[Candidate]:
    """Images of other programs by role, as candidates that have nothing to load.

    Args:
        folders: by role and split, `paths` by role. Results go beside those of models, or into `output`.
    """
    hashes = {role: [folder.sha256 for folder in splits.values()] for role, splits in folders.items()}
    name = f"{list(paths.values())[-1].resolve().name}-{_fingerprint(hashes)}"
    place = (OUTPUTS / name if output is None else Path(output).expanduser()) / subfolder
    found = []
    for role, path in paths.items():
        sha256 = hashlib.sha256("".join(hashes[role]).encode()).hexdigest()
        settings = {"checkpoint": sha256, "images": str(path)}
        record = {"path": str(path), "sha256": sha256}
        found.append(Candidate(role, place, settings, record, _nothing_to_load))
    return found


def _nothing_to_load() -> JanusPolicy:
    raise AssertionError("images of another program have no model")


def run_folder(path: Path) -> Path | None:
    """The training run a file belongs to: the nearest folder above it that holds metrics.csv or config.yaml."""
    for parent in path.absolute().parents:
        if (parent / "metrics.csv").is_file() or (parent / "config.yaml").is_file():
            return parent
    return None


def _folders(models: Mapping[str, Subject], base: str, output: str | None) -> dict[str, Path]:
    asked = None if output is None else Path(output).expanduser()
    if "tuned" not in models:
        return {"base": OUTPUTS / base if asked is None else asked}
    tuned = models["tuned"]
    if asked is not None:
        return {"base": asked / "base", "tuned": asked}
    path = Path(tuned.path)
    run = run_folder(path)
    if run is None:
        return {"base": OUTPUTS / base, "tuned": OUTPUTS / f"{path.stem}-{tuned.sha256[:8]}"}
    return {"base": run / "evaluation" / base, "tuned": run / "evaluation" / path.stem}


def _fingerprint(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that stand for plain settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
