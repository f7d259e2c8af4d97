"""The objectives again, sample by sample and token by token, in float64, without a line of the package.

What is fixed before the update is plain Python numbers; only the last sums are scalars of autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stage.types import Rollout

Numbers = list[float]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of ddof 1."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def cosine(a: Numbers, b: Numbers) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.hypot(*a) * math.hypot(*b))


def task_rewards(record: Rollout, prompt: int) -> Numbers:
    return [
        math.fsum(weight * part for weight, part in zip(record.scores.weights, parts, strict=True))
        for parts in record.scores.parts[prompt].tolist()
    ]


def entropy_rewards(record: Rollout, prompt: int, rewards: Numbers, coefficient: float) -> Numbers:
    assert record.reference is not None
    close = [
        1 / (1 + (mean(reference) - mean(policy)) ** 2)
        for reference, policy in zip(
            record.reference.entropy[prompt].tolist(), record.old.entropy[prompt].tolist(), strict=True
        )
    ]
    best = [index for index, reward in enumerate(rewards) if reward == max(rewards)]
    centre = mean([close[index] for index in best])
    return [coefficient * (close[i] - centre) if i in best else 0.0 for i in range(len(rewards))]


def advantages(rewards: Numbers, extra: Numbers, tied_groups: str) -> Numbers:
    tied = max(rewards) - min(rewards) <= 1e-6 * max(1.0, abs(max(rewards)))
    if tied and (tied_groups == "zero" or not any(extra)):
        return [0.0] * len(rewards)
    if tied and tied_groups == "raw":
        return [value - mean(extra) for value in extra]
    total = [a + b for a, b in zip(rewards, extra, strict=True)]
    return [(value - mean(total)) / (deviation(total) + 1e-4) for value in total]


def similarity(found: Numbers, codes: list[list[Numbers]], *, self_at_zero: bool) -> list[Numbers]:
    group, length = len(found), len(codes[0])
    rows = []
    for i in range(group):
        opponents = [j for j in range(group) if j != i and found[i] * found[j] <= 0]
        count = len(opponents) + (1 if self_at_zero and found[i] == 0 else 0)
        rows.append(
            [
                math.fsum(cosine(codes[i][t], codes[j][t]) for j in opponents) / count if count else 0.0
                for t in range(length)
            ]
        )
    return rows


def clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def group_loss(
    record: Rollout,
    prompt: int,
    logps: Tensor,
    *,
    found: Numbers,
    similar: list[Numbers] | None,
    reweight_advantage: bool,
    reweight_kl: bool,
    beta: float,
    clip_at: tuple[float, float] | None,
) -> Tensor:
    """pg + beta kl of one group; without `clip_at` the ratio is exp(lp - stop_gradient(lp))."""
    gain, divisor, kl = torch.zeros((), dtype=torch.float64), 0.0, torch.zeros((), dtype=torch.float64)
    group, length = record.old.logps.shape[1:]
    for i in range(group):
        for t in range(length):
            lp, s = logps[prompt, i, t], similar[i][t] if similar else 0.0
            weight = clip((1 - s) / 2, 0, 1) if reweight_advantage else 1.0
            divisor += weight
            if clip_at is None:
                gain = gain + weight * torch.exp(lp - lp.detach()) * found[i]
            else:
                ratio = torch.exp(lp - record.old.logps[prompt, i, t].item())
                bounded = torch.clamp(ratio, 1 - clip_at[0], 1 + clip_at[1])
                gain = gain + weight * torch.min(ratio * found[i], bounded * found[i])
            if beta:
                assert record.reference is not None
                apart = record.reference.logps[prompt, i, t].item() - lp
                m = 0.5 + 0.5 * clip(s + 1, 0, 1) if reweight_kl else 1.0
                kl = kl + m * (torch.exp(apart) - apart - 1)
    return -gain / (divisor + (1e-6 if reweight_advantage else 0.0)) + beta * kl / (group * length)


def stage_loss(
    record: Rollout,
    logps: Tensor,
    *,
    reweight_advantage: bool,
    reweight_kl: bool,
    entropy_coefficient: float,
    beta: float,
    clip_at: tuple[float, float],
    tied_groups: str = "raw",
) -> Tensor:
    """The mean over all groups; GRPO with both weights and the coefficient off."""
    losses = []
    for prompt in range(record.old.logps.shape[0]):
        rewards = task_rewards(record, prompt)
        extra = [0.0] * len(rewards)
        if entropy_coefficient:
            extra = entropy_rewards(record, prompt, rewards, entropy_coefficient)
        found = advantages(rewards, extra, tied_groups)
        similar = similarity(found, record.codes[prompt].tolist(), self_at_zero=False)
        losses.append(
            group_loss(
                record,
                prompt,
                logps,
                found=found,
                similar=similar,
                reweight_advantage=reweight_advantage,
                reweight_kl=reweight_kl,
                beta=beta,
                clip_at=clip_at,
            )
        )
    return torch.stack(losses).mean()


def released_loss(
    record: Rollout,
    logps: Tensor,
    *,
    reweight_advantage: bool,
    reweight_kl: bool,
    entropy_coefficient: float,
    beta: float,
) -> tuple[Numbers, list[Numbers], Tensor]:
    """Advantages, similarity and loss of the published code for one prompt."""
    names, parts = record.scores.names, record.scores.parts[0].tolist()
    recipe = "geneval" in names or "ocr" in names
    columns = [list(column) for column in zip(*parts, strict=True)]
    if recipe:
        columns = [column for column in columns if deviation(column) > 1e-6]
    rewards = [math.fsum(column[i] for column in columns) for i in range(len(parts))]
    extra = [0.0] * len(rewards)
    if recipe and entropy_coefficient:
        extra = entropy_rewards(record, 0, rewards, entropy_coefficient)
    total = [a + b for a, b in zip(rewards, extra, strict=True)]
    found = [(value - mean(total)) / (deviation(total) + 1e-4) for value in total]
    similar = similarity(found, record.codes[0].tolist(), self_at_zero=True)
    if recipe and not columns and not entropy_coefficient:
        similar = [[1.0] * len(row) for row in similar]
    loss = group_loss(
        record,
        0,
        logps,
        found=found,
        similar=similar,
        reweight_advantage=reweight_advantage,
        reweight_kl=reweight_kl,
        beta=beta,
        clip_at=None,
    )
    return found, similar, loss
