"""The models that a command looks at: the base, and what training made of it.

`checkpoint=PATH` names a training checkpoint, which records its own model and sampler; or a model folder in either
layout; or the folder of an adapter, which stands on the base of the configuration; or nothing, which is that base
alone. Finding a subject costs a hash; its weights are loaded when images must be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from stage.paths import configured_folder, resolve
from stage.policy.adapter_files import CONFIG, read_adapter
from stage.policy.janus import JanusPolicy
from stage.sharded_checkpoint import RECORD, is_sharded
from stage.training_checkpoint import (
    check_base,
    checkpoint_sha256,
    load_trained,
    read_training_checkpoint,
    weights_sha256,
)

RECORDED = ("model", "sampler")  # groups that a training checkpoint brings with it


@dataclass(frozen=True)
class Subject:
    """A model that can be loaded: `model` is its configuration, `sha256` identifies its weights.

    `checkpoint` is the training checkpoint whose weights replace those of `model`, `update` the rollouts it has
    done; both are None for a model folder. `stamp` is its time and size when it was hashed, None where nobody looked.
    """

    path: str
    sha256: str
    model: Mapping[str, Any]
    checkpoint: Path | None = None
    update: int | None = None
    stamp: tuple[int, int] | None = None

    def load(self, device: torch.device, trainable: bool = False) -> JanusPolicy:
        """The policy in eval mode on `device`, without gradients unless `trainable` keeps those that training has.

        Raises FileNotFoundError or ValueError where the weights cannot be read or are of another base.
        """
        policy = instantiate(OmegaConf.create(dict(self.model)))
        if self.checkpoint is not None:
            trained = read_training_checkpoint(self.checkpoint)
            if self.stamp not in (None, _stamp(self.checkpoint)):
                raise ValueError(
                    f"{self.checkpoint} has changed since it was hashed, as when training goes on beside an "
                    "evaluation; copy the checkpoint, and evaluate the copy"
                )
            source = str(self.model["path"])
            check_base(trained, {"path": source, "sha256": weights_sha256(configured_folder(self.model))})
            load_trained(policy, trained)
        policy = policy.to(device).eval()
        return policy if trainable else policy.requires_grad_(False)

    def image_settings(self, sampler: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Everything but the prompt and the sample index that an image of this model depends on."""
        return {
            "checkpoint": self.sha256,
            "template": self.model["template"],
            "dtype": self.model["dtype"],
            "sampler": dict(sampler),
            "seed": seed,
        }

    def record(self) -> dict[str, Any]:
        """What results.json says about the model."""
        return {"path": self.path, "sha256": self.sha256, "update": self.update, "model": dict(self.model)}


@dataclass(frozen=True)
class Subjects:
    """The base and, unless only the base is meant, the tuned model; `sampler` is the configuration of their sampler.

    `trained_with` is the composed configuration of the training run, None for a model folder; `reward` is the record
    of its scorer (`stage.provenance`), None where the checkpoint has none.
    """

    base: Subject
    tuned: Subject | None
    sampler: Mapping[str, Any]
    trained_with: Mapping[str, Any] | None
    reward: Mapping[str, Any] | None = None

    @property
    def models(self) -> dict[str, Subject]:
        """By role, `base` before `tuned`."""
        return {"base": self.base} | ({} if self.tuned is None else {"tuned": self.tuned})


def find_subjects(config: DictConfig, overrides: Sequence[str]) -> Subjects:
    """What `config.checkpoint` names, beside its base.

    Args:
        config: has `checkpoint`, and `model` and `sampler` for when the checkpoint does not bring its own.
        overrides: the command line; `model...` and `sampler...` given there beat what a checkpoint recorded.

    Raises FileNotFoundError for a path without a model, ValueError for a damaged one.
    """
    path = None if config.checkpoint is None else resolve(str(config.checkpoint))
    if path is None or (path.is_dir() and not is_sharded(path)):
        model, sampler = (_plain(config[group]) for group in RECORDED)
        base = _folder(model if path is None else _without_adapter(model))
        tuned = None if path is None else _tuned(model, path)
        return Subjects(base, None if tuned is None or tuned.sha256 == base.sha256 else tuned, sampler, None)
    trained = read_training_checkpoint(path)
    model, sampler = (recorded(group, config, trained["config"], overrides) for group in RECORDED)
    stamp = _stamp(path)  # before the hash: a change in between is found too
    tuned = Subject(str(path), checkpoint_sha256(path), model, path, int(trained["update"]), stamp)
    base = _folder(_without_adapter(model))
    return Subjects(base, tuned, sampler, trained["config"], trained.get("reward"))


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; anything else is torch's name of a device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error


def _without_adapter(model: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of what an adapter stands on."""
    return {**model, "adapter": None} if "adapter" in model else dict(model)


def _tuned(model: Mapping[str, Any], folder: Path) -> Subject:
    """A model folder or, on top of the base, the folder of an adapter."""
    if not (folder / CONFIG).is_file():
        moved = {**model, "path": str(folder), "revision": None, "subfolder": None}
        if (folder / "tokenizer.json").is_file():
            moved["tokenizer"] = None
        return _folder(moved)
    saved = read_adapter(folder)
    adapter = {
        "_target_": "stage.policy.lora.Lora",
        "rank": saved.rank,
        "alpha": saved.alpha,
        "dropout": 0,
        "targets": list(saved.targets),
        "path": str(folder),
    }
    return Subject(str(folder), weights_sha256(folder), {**model, "adapter": adapter})


def _folder(model: Mapping[str, Any]) -> Subject:
    return Subject(str(model["path"]), weights_sha256(configured_folder(model)), model)


def recorded(
    group: str, config: DictConfig, trained: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The group as the checkpoint recorded it, with the changes that the command line makes to it."""
    names = [override.lstrip("+~").partition("=")[0].replace("/", ".") for override in overrides]
    if group not in trained or group in names:  # sampler=NAME on the command line replaces the group whole
        return _plain(config[group])
    changed = [name for name in names if name.startswith(f"{group}.")]
    node = OmegaConf.create({group: dict(trained[group])})
    for name in changed:
        OmegaConf.update(node, name, OmegaConf.select(config, name))
    return _plain(node[group])


def _plain(node: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(node, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _stamp(path: Path) -> tuple[int, int]:
    """When a checkpoint, of a folder its record, was written, in nanoseconds, and its size in bytes."""
    status = (path / RECORD if path.is_dir() else path).stat()
    return status.st_mtime_ns, status.st_size
