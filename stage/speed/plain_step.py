"""The step as published code takes it, for comparison: a cache that grows, a Python launch for every token, and
log-probabilities from the logits of all positions.

After the description of krennic999/STAGE, src/grpo/src/open_r1/trainer/grpo_trainer.py, without its optimizer. Its
loops over the ranks of each sample's tokens in every other sample's logits, which it never reads, are timed apart.
"""

from __future__ import annotations

from itertools import product
from statistics import median

import torch
from torch import Tensor

from stage.policy.janus import JanusPolicy
from stage.speed.machine import peak_gibibytes, seconds
from stage.speed.models import speed_prompts
from stage.speed.rollout import Row, plain_loop
from stage.types import PromptTokens

RANKS = 50  # a token's rank is looked for among as many


def plain_steps(policy: JanusPolicy, images: int, repeats: int) -> tuple[Row, Row]:
    """Median seconds of `repeats` plain steps of `images` images of one prompt, after one to warm up.

    The first row is the step as it has to be, the second has the loops over ranks in its passes. The columns are those
    of `Step.row`; what is not measured is NaN.
    """
    prompt, device = policy.tokenize(speed_prompts(1)), policy.device
    length = policy.num_image_tokens
    tokens = torch.randint(policy.codebook_size, (1, images, length), device=device)
    taken: list[tuple[float, float, float]] = []

    def step() -> None:
        policy.language_model.eval()  # a checkpointing model in training mode uses no cache
        rollout = seconds(lambda: plain_loop(policy, prompt, images, length), device)
        reference = seconds(lambda: plain_pass(policy, prompt, tokens, gradient=False), device)
        taken.append(
            (rollout, reference, seconds(lambda: plain_pass(policy, prompt, tokens, gradient=True), device))
        )

    step()
    peak = max(peak_gibibytes(step, device) for _ in range(repeats))
    rollout, reference, update = (median(part) for part in zip(*taken[1:], strict=True))
    best = torch.rand(images, length, policy.codebook_size, device=device).topk(min(RANKS, length)).indices
    ranks = seconds(lambda: pairwise_ranks(best, tokens[0]), device)
    rows: list[Row] = [
        {
            "seconds": rollout + reference + update + 2 * loops,
            "rollout_seconds": rollout,
            "reference_seconds": reference + loops,
            "policy_seconds": update + loops,
            "update_seconds": float("nan"),
            "peak_gib": peak,
        }
        for loops in (0.0, ranks)
    ]
    return rows[0], rows[1]


def pairwise_ranks(best: Tensor, tokens: Tensor) -> Tensor:
    """The place `[N, N, L]` of sample j's token at t among sample i's `best` `[N, L, K]`, -1 where it is not there.

    One token after the other, with a wait for the device at each, as the release looks for them.
    """
    found = tokens.new_full((len(best), *tokens.shape), -1)
    for i, j, t in product(range(len(best)), *map(range, tokens.shape)):
        place = (best[i, t] == tokens[j, t].item()).nonzero()
        if len(place):
            found[i, j, t] = place[0].item()
    return found


def plain_pass(policy: JanusPolicy, prompt: PromptTokens, tokens: Tensor, *, gradient: bool) -> None:
    """Score, and go back through the scores where there is a gradient."""
    policy.language_model.train(gradient)
    with torch.set_grad_enabled(gradient):
        logps, _ = plain_scores(policy, prompt, tokens)
        if gradient:
            logps.mean().backward()
    policy.zero_grad()


def plain_scores(policy: JanusPolicy, prompt: PromptTokens, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies `[N, L]` by way of float32 logits `[N, L, V]`."""
    text, _ = policy.prompt_rows(prompt, 1.0)
    flat = tokens.flatten(0, 1)
    image = policy.model.prepare_embeddings_for_image_generation(flat[:, :-1])
    inputs = torch.cat([text.repeat_interleave(len(flat), 0), image], dim=1)
    hidden = policy.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logps = policy.image_logits(hidden[:, text.shape[1] - 1 :], 1.0).float().log_softmax(dim=-1)
    entropy = -(logps.exp() * logps).sum(dim=-1)
    return logps.gather(2, flat.unsqueeze(2))[..., 0], entropy
