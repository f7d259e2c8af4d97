"""Small rollouts and objectives for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stage.objective.objective import Objective
from stage.types import PromptTokens, Rollout, Scores, TokenScores

ALGORITHMS = Path(__file__).resolve().parents[2] / "conf" / "algorithm"
GRPO = {"reweight_advantage": False, "reweight_kl": False, "entropy_coefficient": 0.0}


def build(name: str, **changes: Any) -> Objective:
    """The objective of `conf/algorithm/NAME.yaml` with some keys replaced."""
    config = OmegaConf.load(ALGORITHMS / f"{name}.yaml")
    for key, value in changes.items():
        OmegaConf.update(config, key, value, merge=False)
    return instantiate(config)


def scores(parts: Any, names: Sequence[str] | None = None, weights: Sequence[float] | None = None) -> Scores:
    """Reward parts `[P, G, R]` (or `[P, G]` for one part of weight 1) as a scorer returns them."""
    tensor = torch.as_tensor(parts)
    tensor = tensor[..., None] if tensor.ndim == 2 else tensor
    count = tensor.shape[-1]
    return Scores(
        parts=tensor,
        names=tuple(names or [f"part{index}" for index in range(count)]),
        weights=tuple(weights or [1.0] * count),
        reasons=tuple(("",) * tensor.shape[1] for _ in range(tensor.shape[0])),
    )


def rollout(
    found: Scores,
    *,
    length: int = 5,
    code: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    reference: bool = True,
) -> Rollout:
    """Random log-probabilities, entropies and codes of the shape that the rewards ask for."""
    prompts, group = found.parts.shape[:2]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(prompts, group, length, *shape, generator=generator, dtype=torch.float64).to(dtype)

    old = TokenScores(logps=noise() - 5.0, entropy=noise() + 5.0)
    near = TokenScores(logps=old.logps + 0.3 * noise(), entropy=old.entropy + noise())
    nothing = torch.zeros(prompts, 1, dtype=torch.int64)
    return Rollout(
        update=0,
        prompts=(),
        prompt_tokens=PromptTokens(ids=nothing, unconditional_ids=nothing, mask=nothing),
        tokens=torch.zeros(prompts, group, length, dtype=torch.int64),
        codes=noise(code),
        images=torch.zeros(prompts, group, 1, 1, 3, dtype=torch.uint8),
        scores=found,
        old=old,
        reference=near if reference else None,
        sampled_logps=old.logps + 0.25,
    )


def drifted(record: Rollout, amount: float = 0.3, seed: int = 1) -> Tensor:
    """Log-probabilities of a policy that has moved on since the rollout, a leaf with gradient."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(record.old.logps.shape, generator=generator, dtype=torch.float64)
    return (record.old.logps + amount * step.to(record.old.logps.dtype)).requires_grad_()


def evaluate(objective: Objective, record: Rollout, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and its gradient with respect to `logps`."""
    credit, _ = objective.credit(record)
    loss, _ = objective.loss(TokenScores(logps=logps, entropy=record.old.entropy), credit)
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


def some_rewards(kind: str, prompts: int, group: int, seed: int) -> Tensor:
    """`continuous` rewards, `discrete` ones with ties and samples at the mean, or `equal` ones; `[P, G]`."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "continuous":
        return torch.rand(prompts, group, generator=generator, dtype=torch.float64)
    if kind == "discrete":
        return torch.randint(0, 3, (prompts, group), generator=generator).double() / 2
    return torch.full((prompts, group), 0.7, dtype=torch.float64)
