"""Image logits the slow way: one image at a time, no padding, no cache, one forward for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage.policy.janus import JanusPolicy


def prompt_ids(policy: JanusPolicy, text: str) -> Tensor:
    """`[T]` tokens of one prompt through the processor's path: text, then the image start token."""
    return torch.tensor(policy.tokenizer(text + policy.tokenizer.boi_token)["input_ids"])


def unconditional(policy: JanusPolicy, ids: Tensor) -> Tensor:
    """Bos and the image start token stay, every other token becomes padding."""
    kept = (policy.tokenizer.bos_token_id, policy.tokenizer.boi_token_id)
    return torch.tensor([token if token in kept else policy.tokenizer.pad_token_id for token in ids.tolist()])


def row_logits(policy: JanusPolicy, ids: Tensor, tokens: Tensor) -> Tensor:
    """Float64 `[n + 1, V]`: logits of the image tokens that follow `ids` `[T]` and image `tokens` `[n]`."""
    model = policy.model
    embeddings = model.get_input_embeddings()(ids)
    if len(tokens):
        embeddings = torch.cat([embeddings, model.prepare_embeddings_for_image_generation(tokens)])
    hidden = model.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]
    return model.model.generation_head(hidden[len(ids) - 1 :]).double()


def guided_logits(policy: JanusPolicy, text: str, tokens: Tensor, scale: float) -> Tensor:
    """Float64 `[n + 1, V]`: logits after `tokens` `[n]` at a guidance scale."""
    ids = prompt_ids(policy, text)
    conditional = row_logits(policy, ids, tokens)
    if scale == 1:
        return conditional
    free = row_logits(policy, unconditional(policy, ids), tokens)
    return free + scale * (conditional - free)


def tolerance(scale: float, temperature: float = 1.0) -> dict[str, Any]:
    """How closely two float32 computations of a log-probability agree, never above 1e-4.

    Logits are known to about 1e-5. Guidance adds s of one to s - 1 of another, and temperature divides the sum.
    """
    return {"atol": min(1e-4, 1e-5 * (2 * scale - 1) / temperature), "rtol": 1e-6}
