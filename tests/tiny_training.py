"""A training run of seconds for the tests: a random small Janus, four prompts, and a reward for red pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf
from torch import Tensor

from stage.data import PromptStream, prompt_id
from stage.module import StageModule
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.sampler import Sampler
from stage.policy.template import Template
from stage.training_checkpoint import weights_sha256
from stage.types import Prompt, Scores
from tests.policy.tiny_model import build_tiny_janus

ROOT = Path(__file__).resolve().parents[1]
FROZEN = (
    "vision_model",
    "aligner",
    "vqmodel",
    "generation_embeddings",
    "generation_aligner",
    "generation_head",
)
TEXTS = (
    "a red circle",
    "a blue square",
    "two green circle",
    "a yellow triangle and a red square",
    "three blue circle",
)
PROMPTS = tuple(
    Prompt(prompt_id(text), text, {"tag": "counting" if index % 2 else "single_object", "prompt": text})
    for index, text in enumerate(TEXTS)
)


class Redness:
    """`red`: share of red in the pixels, in [0, 1], plus noise from torch's own generator; `strict`: red above a half.

    The noise makes the reward depend on the state of a random number generator, as a careless scorer would.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.noise = noise

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        red = images[..., 0].float().mean(dim=(2, 3)) / 255
        parts = torch.stack([red + self.noise * torch.rand(red.shape), (red > 0.5).float()], dim=-1)
        reasons = tuple(tuple(f"{value:.2f} red" for value in row) for row in red.tolist())
        return Scores(parts, ("red", "strict"), (1.0, 0.0), reasons)


class Ignorant(Redness):
    """A scorer that fails its own check."""

    def self_check(self) -> None:
        raise ValueError("red is not red")


class Dying(Redness):
    """Fails in its call number `at`, counted from 1."""

    def __init__(self, noise: float, at: int) -> None:
        super().__init__(noise)
        self.at, self.calls = at, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        found = super().__call__(images, prompts)
        if self.calls == self.at:
            raise ConnectionError("the reward servers are gone")
        return found


def objective(name: str = "grpo", **changes: Any) -> Any:
    """The objective of conf/algorithm/NAME.yaml with some values changed."""
    config = OmegaConf.load(ROOT / "conf" / "algorithm" / f"{name}.yaml")
    return instantiate(OmegaConf.merge(config, changes))


def tiny_base(folder: Path) -> Path:
    """Write the weights of a policy on 16 tokens from 64 codes into `folder`."""
    return build_tiny_janus(folder, sharpness=5.0)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> str:
    """A prompt file with these prompts and something to be seen for each; its path."""
    include = [{"class": "circle", "count": 1}]
    lines = [json.dumps({**prompt.metadata, "include": include}) for prompt in prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def tiny_world(folder: Path) -> list[str]:
    """Write base weights, a prompt file, and a configuration for the reward; the arguments of train.py that say so."""
    tiny_base(folder / "janus")
    prompts = write_prompts(folder / "prompts.jsonl", PROMPTS)
    (folder / "conf" / "reward").mkdir(parents=True)
    (folder / "conf" / "reward" / "redness.yaml").write_text(
        "_target_: tests.tiny_training.Redness\nnoise: 0.3\n", encoding="utf-8"
    )
    own = ["--config-dir", str(folder / "conf"), "reward=redness", f"model.path={folder / 'janus'}"]
    own += [f"data.train={prompts}", f"data.validation={prompts}", "data.heldout=null"]
    return [*own, "data.prompts_per_update=2", "group_size=4"]


def tiny_policy(folder: Path) -> JanusPolicy:
    """The policy of the weights in `folder`; everything is frozen but the language model."""
    return load_policy(str(folder), Template("plain", "", ""), "float32", FROZEN, False)


def tiny_module(folder: Path, **changes: Any) -> StageModule:
    """A module with two prompts and four samples an update, 2 updates an epoch; `changes` replace its arguments."""
    arguments: dict[str, Any] = {
        "policy": tiny_policy(folder),
        "sampler": Sampler(guidance_scale=1.0, temperature=1.0),
        "scorer": Redness(),
        "objective": objective(),
        "prompts": PromptStream(PROMPTS[:4], prompts_per_update=2, seed=0),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "scheduler": partial(
            torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=10
        ),
        "group_size": 4,
        "gradient_clip": 1.0,
        "seed": 0,
        "updates": 3,
        "base": {"path": str(folder), "sha256": weights_sha256(folder)},
        "reward_beside_reference": False,
        "reference_on_cpu": False,
        "config": {"updates": 3},
        "overrides": [],
    }
    return StageModule(**(arguments | changes))


def tiny_trainer(
    folder: Path, callbacks: Sequence[Callback] = (), loggers: Sequence[Logger] = (), **changes: Any
) -> Trainer:
    """The trainer of conf/trainer/default.yaml on the CPU; `changes` replace its arguments."""
    config = OmegaConf.load(ROOT / "conf" / "trainer" / "default.yaml")
    config = OmegaConf.merge(
        config, {"accelerator": "cpu", "devices": 1, "default_root_dir": str(folder)}, changes
    )
    bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    return instantiate(config, callbacks=list(callbacks), logger=list(loggers), enable_progress_bar=bar)


def weights(module: StageModule) -> Mapping[str, Tensor]:
    """A copy of what training changes."""
    return {n: p.detach().clone() for n, p in module.policy.named_parameters() if p.requires_grad}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
