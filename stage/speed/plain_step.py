"""The step as published code takes it, for comparison: a cache that grows, a Python launch for every token, and
log-probabilities from the logits of all positions.

After the description of krennic999/STAGE, src/grpo/src/open_r1/trainer/grpo_trainer.py. Its loops over ranks and its
optimizer are left out, so the real one takes longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stage.policy.janus import JanusPolicy
from stage.speed.machine import peak_gibibytes, seconds
from stage.speed.models import speed_prompts
from stage.speed.rollout import Row, plain_loop
from stage.types import PromptTokens


def plain_step(policy: JanusPolicy, images: int, timed_tokens: int) -> Row:
    """Seconds of a plain step of `images` images of one prompt; the rollout is scaled from its first tokens.

    The columns are those of `Step.row`; what is not measured is NaN.
    """
    prompt, device = policy.tokenize(speed_prompts(1)), policy.device
    timed_tokens = min(timed_tokens, policy.num_image_tokens)
    policy.language_model.eval()  # a checkpointing model in training mode uses no cache
    plain_loop(policy, prompt, images, 2)
    scale = policy.num_image_tokens / timed_tokens
    rollout = scale * seconds(lambda: plain_loop(policy, prompt, images, timed_tokens), device)
    tokens = torch.randint(policy.codebook_size, (1, images, policy.num_image_tokens), device=device)

    def forward() -> None:
        plain_pass(policy, prompt, tokens, gradient=False)

    def both() -> None:
        plain_pass(policy, prompt, tokens, gradient=True)

    forward()
    reference, peak = seconds(forward, device), peak_gibibytes(both, device)
    update = seconds(both, device)
    return {
        "seconds": rollout + reference + update,
        "rollout_seconds": rollout,
        "reference_seconds": reference,
        "policy_seconds": update,
        "update_seconds": float("nan"),
        "peak_gib": peak,
    }


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
