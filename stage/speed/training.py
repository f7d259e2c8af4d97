"""Seconds and memory of one training step, part by part, on a policy with random weights.

The step is the one that `StageModule` takes: rollout, VQ decode, a trivial reward, reference pass, policy pass with
gradient, update; only Lightning's loop around it is missing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stage.group_draws import Stopwatch
from stage.objective.advantage import GroupAdvantage
from stage.objective.aggregation import GroupMean
from stage.objective.divergence import K3
from stage.objective.entropy import EntropyReward
from stage.objective.objective import Objective
from stage.objective.similarity import StageWeights
from stage.objective.surrogate import ClippedRatio
from stage.optimizer import MasterAdamW
from stage.policy.janus import JanusPolicy
from stage.policy.lora import add_lora
from stage.policy.reference import frozen_reference, place_reference
from stage.policy.sampler import Sampler
from stage.rollout import collect
from stage.speed.models import build_policy, speed_prompts
from stage.speed.plain_step import plain_steps
from stage.speed.rollout import GUIDANCE, Row
from stage.types import Metrics, Prompt, PromptTokens, Samples, Scores

# What the STAGE release freezes; the text head is never run for images.
FROZEN = (
    "vision_model",
    "aligner",
    "vqmodel",
    "generation_embeddings",
    "generation_aligner",
    "generation_head",
    "lm_head",
)
LORA: dict[str, Any] = {
    "rank": 32,
    "alpha": 64.0,
    "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
KINDS = ("lora", "full")
REPEATS = 2  # measured steps, after one that warms up
PARTS = ("sample", "decode", "reward", "reference", "replay", "backward", "update")


@dataclass(frozen=True)
class Step:
    """A measured step: `seconds` of each of `PARTS`, and the most memory allocated in each, bytes.

    `replay` is the policy's forward pass with gradient, `update` clipping and the optimizer.
    """

    seconds: Metrics
    peaks: dict[str, int]

    def row(self, model: str, step: str, images: int) -> Row:
        """A line of the table, in seconds and GiB."""
        rollout, reference, policy, update = (
            sum(self.seconds[part] for part in parts)
            for parts in (("sample", "decode", "reward"), ("reference",), ("replay", "backward"), ("update",))
        )
        return {
            "model": model,
            "step": step,
            "images": images,
            "seconds": sum(self.seconds.values()),
            "rollout_seconds": rollout,
            "reference_seconds": reference,
            "policy_seconds": policy,
            "update_seconds": update,
            "peak_gib": max(self.peaks.values()) / 2**30,
        }


class Meter(Stopwatch):
    """A stopwatch that also keeps the most memory allocated in each part, bytes; 0 where there is no CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with super().__call__(name):
            yield
        self.peaks[name] = torch.cuda.max_memory_allocated(self.device) if cuda else 0


class RandomTokens:
    """Stands where a sampler stands, and takes no time: for the parts of a step after the rollout."""

    guidance_scale, temperature = 5.0, 1.0

    def __call__(self, policy: JanusPolicy, prompt: PromptTokens, uniforms: Tensor) -> Samples:
        tokens = (uniforms.to(policy.device) * policy.codebook_size).long()
        return Samples(tokens, torch.zeros(tokens.shape, device=policy.device))

    def release(self) -> None:
        """Nothing is held."""


def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """A trivial reward: the mean of the pixels, in [0, 1]."""
    parts = images.float().mean(dim=(2, 3, 4), keepdim=True)[..., 0, 0] / 255
    return Scores(parts, ("brightness",), (1.0,), tuple(("",) * images.shape[1] for _ in prompts))


def stage_objective() -> Objective:
    """The objective of conf/algorithm/stage.yaml."""
    return Objective(
        reweight_advantage=True,
        reweight_kl=True,
        entropy_coefficient=0.4,
        beta=0.01,
        clip_low=0.2,
        clip_high=0.2,
        tied_groups="raw",
        updates_per_rollout=1,
        micro_batch=None,
        distribution="conditional",
        resampling_rounds=0,
        advantage=GroupAdvantage(epsilon=1e-4),
        token_weights=StageWeights(),
        ratio=ClippedRatio(),
        divergence=K3(),
        aggregation=GroupMean(epsilon=1e-6),
        entropy_reward=EntropyReward(best_only=True),
        critical_tokens=None,
        penalty=None,
        beta_schedule=None,
    )


def prepare(policy: JanusPolicy, kind: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """Freeze what the release freezes, attach adapters for `lora`, and say what trains the rest of `full`.

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"a training step is measured for lora or full; got {kind!r}. Name one of them.")
    policy.freeze(FROZEN)
    if kind == "lora":
        add_lora(policy, **LORA)
    policy.enable_gradient_checkpointing()
    if kind == "lora":
        return partial(torch.optim.AdamW, lr=1e-4, fused=True, **ADAM)
    return partial(MasterAdamW, lr=1e-6, **ADAM)


def measure_steps(sizes: Sequence[str], images: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Rows of a step of `images` images with LoRA and in full, and of the plain step, for each model.

    `plain_over` is how many times as long the plain step takes, `release_over` with the release's loops over ranks.
    """
    rows: list[Row] = []
    for size in sizes:
        for kind in KINDS:
            policy, sampler = build_policy(size, device, dtype), Sampler(GUIDANCE, 1.0)
            step = measure_step(policy, kind, sampler=sampler, images=images, repeats=REPEATS)
            rows.append(step.row(size, kind, images))
            sampler.release()
            del policy
            _empty(device)
        policy = build_policy(size, device, dtype)
        prepare(policy, "full")
        plain = plain_steps(policy, images, REPEATS)
        for name, row in zip(("plain", "release"), plain, strict=True):
            rows.append({"model": size, "step": name, "images": images, **row})
        for row in rows[-4:]:
            row["plain_over"], row["release_over"] = (
                float(other["seconds"]) / float(row["seconds"]) for other in plain
            )
        del policy
        _empty(device)
    return rows


def _empty(device: torch.device) -> None:
    """Give the memory of a model that is gone back, cycles included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_step(
    policy: JanusPolicy, kind: str, *, sampler: Any, images: int, repeats: int, reference_on_cpu: bool = False
) -> Step:
    """Median seconds and largest memory of `repeats` steps of `images` images of one prompt, after one to warm up."""
    optimizer_of, objective = prepare(policy, kind), stage_objective()
    reference = frozen_reference(policy)
    place_reference(reference, policy, policy.device, reference_on_cpu)
    optimizer = optimizer_of([parameter for parameter in policy.parameters() if parameter.requires_grad])
    meters = []
    for update in range(repeats + 1):
        meters.append(Meter(policy.device))
        _step(policy, reference, optimizer, objective, sampler, images, update, meters[-1])
    return Step(
        {part: median(meter.seconds[part] for meter in meters[1:]) for part in PARTS},
        {part: max(meter.peaks[part] for meter in meters[1:]) for part in PARTS},
    )


def _step(
    policy: JanusPolicy,
    reference: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    sampler: Any,
    images: int,
    update: int,
    meter: Meter,
) -> None:
    """One step, as `StageModule.training_step` makes it when all samples fit into one forward pass."""
    collected = collect(
        policy,
        reference,
        sampler,
        brightness,
        objective,
        [Prompt(index, text) for index, text in enumerate(speed_prompts(1))],
        update=update,
        seed=0,
        group_size=images,
        differentiable=True,
        beside=False,
        watch=meter,
    )
    assert collected.scores is not None
    with meter("backward"):
        credit, _ = objective.credit(collected.rollout)
        optimizer.zero_grad()
        objective.loss(collected.scores, credit)[0].backward()
    with meter("update"):
        gradients = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(gradients, 1.0)
        optimizer.step()
