"""A run on recorded tokens that several processes must repeat number for number."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from torch import Tensor

from stage.data import PromptStream
from stage.policy.janus import JanusPolicy, load_policy
from stage.policy.lora import add_lora
from stage.policy.sampler import Sampler
from stage.policy.template import Template
from stage.types import Prompt, PromptTokens, Samples, Scores
from tests.tiny_training import (
    FROZEN,
    PROMPTS,
    ROOT,
    Redness,
    objective,
    tiny_module,
    tiny_policy,
    tiny_trainer,
)

UPDATES = 3
MANY = tuple(Prompt(number, f"a {word} circle") for number, word in enumerate(["red", "blue", "green"] * 4))


@dataclass(frozen=True)
class Case:
    """One run: `recorded` draws tokens that do not depend on the weights."""

    algorithm: str
    lora: bool = False
    micro_batch: int | None = None
    dtype: str = "float64"
    prompts: int = 4
    recorded: bool = True
    updates: int = UPDATES
    rounds: int = 0
    compared: bool = False
    plans: bool = False
    slot: str | None = None  # a file of conf/algorithm
    beside: bool = False
    reweighted: bool = False

    def __str__(self) -> str:
        words = [self.algorithm, "lora" if self.lora else "full", self.dtype, f"p{self.prompts}"]
        words += [f"r{self.rounds}"] if self.rounds else []
        words += [self.slot.split("/")[-1]] if self.slot else []
        words += [name for name in ("compared", "plans", "beside", "reweighted") if getattr(self, name)]
        return "-".join([*words, *([f"m{self.micro_batch}"] if self.micro_batch else [])])


class Recorded:
    """Tokens that are a function of (seed, update, prompt, sample), whatever the policy is."""

    guidance_scale, temperature = 1.0, 1.0

    def __call__(self, policy: Any, prompt: PromptTokens, uniforms: Tensor) -> Samples:
        tokens = (uniforms.to(policy.device) * policy.codebook_size).long()
        return Samples(tokens, torch.zeros(tokens.shape, device=policy.device))

    def release(self) -> None:
        """Nothing is held."""


class Apart(Redness):
    """How far an image's red is from the mean of its group."""

    compares_group = True

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        found = super().__call__(images, prompts)
        return replace(found, parts=(found.parts - found.parts.mean(1, keepdim=True)).abs())


class Picky(Redness):
    """Finds no difference between the images of most prompts."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        found = super().__call__(images, prompts)
        differ = torch.tensor([prompt.id % 3 == 0 for prompt in prompts])
        return replace(found, parts=found.parts * differ[:, None, None])


class Steps(Callback):
    """What each optimizer step was made of."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.tokens: list[dict[int, Tensor]] = []

    def on_rollout(self, module: Any, rollout: Any) -> dict[str, float]:
        drawn = zip(rollout.prompts, rollout.tokens, strict=True)
        self.tokens.append({prompt.id: tokens.clone() for prompt, tokens in drawn})
        return {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.policy.named_parameters()
        self.gradients.append({n: whole(p.grad).clone() for n, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        rows = {n: v for n, v in pl_module.latest.items() if not n.startswith("time/")}
        self.rows.append(rows)


def planner(base: Path) -> JanusPolicy:
    """A policy that plans; with several end tokens, so that the plans of random weights have many lengths."""
    policy = load_policy(
        str(base), Template("asking", "", "", "a photo of {prompt} :"), "float32", FROZEN, False
    )
    policy.model.generation_config.eos_token_id = [2, 9, 12, 17, 20, 23]
    return policy


def changes_of(case: Case) -> dict[str, Any]:
    """What differs from conf/algorithm of a case."""
    changes: dict[str, Any] = {"micro_batch": case.micro_batch, "resampling_rounds": case.rounds}
    if case.reweighted:
        changes |= {"reweight_advantage": True, "reweight_kl": True}
    if case.slot is not None:
        changes[case.slot.split("/")[0]] = OmegaConf.load(ROOT / "conf" / "algorithm" / f"{case.slot}.yaml")
    return changes


def sampler_of(case: Case) -> Any:
    """What draws the samples of a case."""
    if case.recorded:
        return Recorded()
    return Sampler(1.0, 1.0, "text", 0.5, 6, 1.2) if case.plans else Sampler(1.0, 1.0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of one that is sharded."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def module_of(case: Case, base: Path) -> Any:
    """The module of a case."""
    torch.manual_seed(0)  # of the adapters
    policy = planner(base) if case.plans else tiny_policy(base)
    policy.to(getattr(torch, case.dtype))
    if case.lora:
        add_lora(policy, rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
        policy.to(getattr(torch, case.dtype))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return tiny_module(
        base,
        policy=policy,
        sampler=sampler_of(case),
        scorer=Apart() if case.compared else Picky() if case.rounds else Redness(),
        objective=objective(case.algorithm, **changes_of(case)),
        prompts=PromptStream(MANY if case.rounds else PROMPTS[:4], prompts_per_update=case.prompts, seed=0),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        updates=case.updates,
        reward_beside_reference=case.beside,
    )


def fit_case(
    case: Case, base: Path, folder: Path, strategy: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Metrics, gradients and tokens of each update, these by prompt, and the trained weights after the last."""
    module, steps = module_of(case, base), Steps()
    changes = (
        {} if strategy is None else {"strategy": dict(strategy), "devices": int(os.environ["WORLD_SIZE"])}
    )
    trainer = tiny_trainer(folder, [steps], [], enable_checkpointing=False, **changes)
    trainer.fit(module)
    trained = {n: whole(p.detach()).clone() for n, p in module.policy.named_parameters() if p.requires_grad}
    return {"rows": steps.rows, "gradients": steps.gradients, "tokens": steps.tokens, "weights": trained}


def fit_cases(
    cases: list[Case], base: Path, folder: Path, strategy: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Several runs in one process, one after the other."""
    return [fit_case(case, base, folder, strategy) for case in cases]


def largest_gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest absolute difference between tensors of the same names."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
