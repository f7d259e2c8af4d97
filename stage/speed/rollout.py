"""Seconds of a rollout against the memory floor, transformers' generate and a plain loop over a dynamic cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from stage.policy.janus import JanusPolicy
from stage.policy.sampler import Sampler, uniforms
from stage.speed.machine import peak_gibibytes, seconds
from stage.speed.models import PROMPT_TOKENS, build_policy, speed_prompts
from stage.types import PromptTokens

GUIDANCE, GROUP = 5.0, 8
Row = dict[str, float | str]


def measure_rollouts(
    sizes: Sequence[str],
    images: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    bytes_per_second: float,
    baseline_tokens: int,
) -> tuple[list[Row], list[Row]]:
    """Rows of `rollout_row`, one a model and number of images, and of `check_row`, one a model.

    The baselines make the first `baseline_tokens` tokens of their images and are scaled to all of them.
    """
    rows, checks = [], []
    for size in sizes:
        policy = build_policy(size, device, dtype).requires_grad_(False).eval()
        for number in images:
            rows.append(rollout_row(policy, size, number, bytes_per_second, baseline_tokens))
            print(rows[-1], flush=True)
        checks.append(check_row(policy, size, min(images), baseline_tokens))
        del policy
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, checks


def rollout_row(
    policy: JanusPolicy, size: str, images: int, bytes_per_second: float, baseline_tokens: int
) -> Row:
    """One line of the table; the rollout is timed after a first one that compiles and captures."""
    prompt, draws = batch(policy, images)
    sampler, device, length = Sampler(GUIDANCE, 1.0), policy.device, policy.num_image_tokens

    def run() -> None:
        sampler(policy, prompt, draws)

    first = seconds(run, device)
    taken: list[float] = []
    peak = peak_gibibytes(lambda: taken.append(seconds(run, device)), device)
    sampler.release()
    floor = floor_bytes(policy, images) / bytes_per_second
    (
        generate(policy, prompt, images, 2),
        plain_loop(policy, prompt, images, 2),
    )  # the first call of a shape is slow
    best, scale = taken[0], length / min(baseline_tokens, length)
    return {
        "model": size,
        "images": images,
        "seconds": best,
        "floor_seconds": floor,
        "ratio": best / floor,
        "images_per_second": images / best,
        "tokens_per_second": images * length / best,
        "peak_gib": peak,
        "warm_up_seconds": first - best,
        "generate_seconds": scale
        * seconds(lambda: generate(policy, prompt, images, baseline_tokens), device),
        "plain_loop_seconds": scale
        * seconds(lambda: plain_loop(policy, prompt, images, baseline_tokens), device),
    }


def check_row(policy: JanusPolicy, size: str, images: int, baseline_tokens: int) -> Row:
    """One full run of the plain loop beside its scaled time, and log-probabilities of decoding against a replay."""
    prompt, draws = batch(policy, images)
    length, device = policy.num_image_tokens, policy.device
    scaled = seconds(lambda: plain_loop(policy, prompt, images, baseline_tokens), device) * length
    whole: list[tuple[Tensor, Tensor]] = []
    row: Row = {
        "model": size,
        "images": images,
        "plain_loop_full_seconds": seconds(
            lambda: whole.append(plain_loop(policy, prompt, images, length)), device
        ),
        "plain_loop_scaled_seconds": scaled / min(baseline_tokens, length),
    }
    for name, guidance in (("conditional", 1.0), ("guided", GUIDANCE)):
        sampler = Sampler(guidance, 1.0)
        samples = sampler(policy, prompt, draws)
        sampler.release()
        row |= gap(f"{name}_gap", policy, prompt, samples.tokens, samples.logps, guidance)
    tokens, logps = (part.view(draws.shape) for part in whole[0])
    return row | gap("plain_loop_guided_gap", policy, prompt, tokens, logps, GUIDANCE)


@torch.no_grad()
def gap(
    name: str, policy: JanusPolicy, prompt: PromptTokens, tokens: Tensor, logps: Tensor, guidance: float
) -> Row:
    """Mean and 99th percentile of |log p while decoding - log p replayed| over the tokens `[P, G, L]`."""
    replayed = policy.score(prompt, tokens, guidance_scale=guidance, temperature=1.0)
    found = (logps - replayed.logps).abs().flatten()
    return {f"{name}_mean": float(found.mean()), f"{name}_p99": float(found.quantile(0.99))}


def batch(policy: JanusPolicy, images: int) -> tuple[PromptTokens, Tensor]:
    """Prompts in groups of eight, and the uniforms of their images."""
    group = math.gcd(images, GROUP)
    prompts = images // group
    return policy.tokenize(speed_prompts(prompts)), uniforms(
        0, 0, range(prompts), group, policy.num_image_tokens
    )


def floor_bytes(policy: JanusPolicy, images: int) -> int:
    """The fewest bytes a guided rollout reads: at every token all weights once, and the keys and values so far."""
    config: Any = policy.language_model.config
    weights = sum(p.nbytes for p in policy.language_model.layers.parameters())
    weights += sum(p.nbytes for p in policy.model.model.generation_head.parameters())
    itemsize = policy.language_model.norm.weight.dtype.itemsize
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    length = policy.num_image_tokens
    return length * weights + 2 * images * per_token * sum(PROMPT_TOKENS + step for step in range(length))


@torch.no_grad()
def generate(policy: JanusPolicy, prompt: PromptTokens, images: int, tokens: int) -> Tensor:
    """transformers' own generate, stopped after `tokens` image tokens: `[N, tokens]`."""
    group = images // len(prompt.ids)
    ids, mask = (part.repeat_interleave(group, 0) for part in (prompt.ids, prompt.mask))
    model: Any = policy.model
    # Handed a cache, since generate of transformers 5.17 fails to make its own.
    room = ids.shape[1] + policy.num_image_tokens
    cache = StaticCache(config=model.config.text_config, max_cache_len=room)
    with _image_tokens(policy, tokens):
        return model.generate(
            ids,
            attention_mask=mask,
            guidance_scale=GUIDANCE,
            do_sample=True,
            generation_mode="image",
            past_key_values=cache,
        )


@contextmanager
def _image_tokens(policy: JanusPolicy, tokens: int) -> Iterator[None]:
    config: Any = policy.model.model.vision_model.config
    former = config.num_image_tokens
    config.num_image_tokens = min(tokens, former)
    try:
        yield
    finally:
        config.num_image_tokens = former


@torch.no_grad()
def plain_loop(policy: JanusPolicy, prompt: PromptTokens, images: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The loop of the published sampling scripts: tokens and log-probabilities `[N, tokens]`.

    A forward of the whole model a token over a cache that grows by concatenation, then softmax and multinomial
    (deepseek-ai/Janus, generation_inference.py).
    """
    embeddings, mask = policy.prompt_rows(prompt, GUIDANCE)
    group = images // len(prompt.ids)
    embeddings, mask = embeddings.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
    cache, drawn, logps = DynamicCache(), [], []
    for _ in range(min(tokens, policy.num_image_tokens)):
        out = policy.language_model(
            inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        logits = policy.model.model.generation_head(out.last_hidden_state[:, -1])
        conditional, free = logits.chunk(2)
        chances = (free + GUIDANCE * (conditional - free)).float().softmax(-1)
        token = chances.multinomial(1)
        drawn.append(token)
        logps.append(chances.gather(1, token).log())
        embeddings = policy.model.prepare_embeddings_for_image_generation(token.repeat(2, 1))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(drawn, 1), torch.cat(logps, 1)
