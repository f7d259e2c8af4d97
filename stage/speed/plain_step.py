"""The step as published code takes it, for comparison: a cache that grows, a Python launch for every token, and
log-probabilities from the logits of all positions.

Written after the description of krennic999/STAGE, src/grpo/src/open_r1/trainer/grpo_trainer.py: guided sampling with
transformers' dynamic cache, then two passes whose logits stay in memory.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stage.policy.janus import JanusPolicy
from stage.speed.models import speed_prompts
from stage.speed.training import Step
from stage.types import PromptTokens

GUIDANCE = 5.0


@torch.no_grad()
def plain_rollout(policy: JanusPolicy, prompt: PromptTokens, images: int, length: int) -> Tensor:
    """The first `length` image tokens of `images` samples of one prompt, `[1, images, length]`."""
    rows, mask = policy.prompt_rows(prompt, GUIDANCE)
    inputs, mask = rows.repeat_interleave(images, 0), mask.repeat_interleave(images, 0)
    policy.language_model.eval()  # a checkpointing model in training mode uses no cache
    cache, drawn = DynamicCache(), []
    for _ in range(length):
        hidden = policy.language_model(
            inputs_embeds=inputs, attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        probabilities = policy.image_logits(hidden, GUIDANCE).softmax(dim=-1)
        drawn.append(torch.multinomial(probabilities, 1))
        inputs = policy.model.prepare_embeddings_for_image_generation(drawn[-1].repeat(2, 1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.cat(drawn, dim=1).unsqueeze(0)


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


def measure_plain_step(policy: JanusPolicy, *, images: int, timed_tokens: int) -> Step:
    """Seconds of a plain step: its rollout scaled from the first `timed_tokens` tokens, its passes in full.

    The policy is trained as it comes; the update of its weights is left out, as are the loops over ranks that the
    published code has beside it.
    """
    prompt, length = policy.tokenize(speed_prompts(1)), policy.num_image_tokens
    if policy.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(policy.device)
    plain_rollout(policy, prompt, images, 2)
    started = _now(policy)
    plain_rollout(policy, prompt, images, timed_tokens)
    seconds = {"sample": (_now(policy) - started) * length / timed_tokens}
    tokens = torch.randint(policy.codebook_size, (1, images, length), device=policy.device)
    for part in ("reference", "policy"):  # the first round warms up
        for _ in range(2):
            started = _now(policy)
            _pass(policy, prompt, tokens, gradient=part == "policy")
            seconds[part] = _now(policy) - started
    peak = torch.cuda.max_memory_allocated(policy.device) if policy.device.type == "cuda" else 0
    seconds["total"] = sum(seconds.values())
    return Step(f"plain loop, scaled from {timed_tokens} tokens", images, seconds, {"total": peak})


def _pass(policy: JanusPolicy, prompt: PromptTokens, tokens: Tensor, *, gradient: bool) -> None:
    policy.language_model.train(gradient)
    with torch.set_grad_enabled(gradient):
        logps, _ = plain_scores(policy, prompt, tokens)
        if gradient:
            logps.mean().backward()
    policy.zero_grad()


def _now(policy: JanusPolicy) -> float:
    device: Any = policy.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
