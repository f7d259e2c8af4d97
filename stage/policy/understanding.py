"""The other half of Janus: questions about an image answered in words, and what its vision tower sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin

from stage.policy.janus import JanusPolicy

PLACE = "{image}"


@torch.no_grad()
def answer(policy: JanusPolicy, image: np.ndarray, text: str, max_new_tokens: int) -> str:
    """The most likely words, in one line, that go on after `text` about a uint8 image `[H, W, 3]`.

    Args:
        text: with `{image}` once where the model is to see the image.
        max_new_tokens: an answer ends with the end token, or here.

    Raises ValueError for a text that does not say where the image is.
    """
    if text.count(PLACE) != 1:
        raise ValueError(
            f"a question has {PLACE} once, where the image is to stand, got {text!r}; write it so"
        )
    words: Any = policy.tokenizer
    shown = words.boi_token + words.image_token * policy.num_image_tokens + words.eoi_token
    batch = words([text.replace(PLACE, shown)], return_tensors="pt").to(policy.device)
    ids = batch["input_ids"]
    settings = GenerationConfig(
        do_sample=False,
        max_length=ids.shape[1] + max_new_tokens,  # the model's own configuration may have another
        pad_token_id=policy.pad_token_id,
        guidance_scale=1.0,
    )
    generate: Any = GenerationMixin.generate
    # What Janus's own `generate` does for text, without the argument beside a configuration that transformers warns of.
    found: Tensor = generate(
        policy.model,
        ids,
        attention_mask=batch["attention_mask"],
        pixel_values=pixels(policy, image[None]),
        generation_config=settings,
    )
    # Given ids, transformers returns them before what it made.
    return " ".join(words.decode(found[0, ids.shape[1] :], skip_special_tokens=True).split())


@torch.no_grad()
def features(policy: JanusPolicy, images: np.ndarray) -> Tensor:
    """Unit vectors `[N, D]`, float32, of uint8 images `[N, H, W, 3]`: the mean of the vision tower's patches."""
    tower: Any = policy.model.model.vision_model
    hidden: Tensor = tower(pixels(policy, images)).last_hidden_state
    return F.normalize(hidden.float().mean(dim=1), dim=-1)


def pixels(policy: JanusPolicy, images: np.ndarray) -> Tensor:
    """Images `[N, H, W, 3]` as the vision tower takes them, in the type of its weights."""
    processor: Any = policy.image_processor
    # Copies: arrays that come from Pillow cannot be written to, and torch warns of it.
    batch = processor(images=[np.array(image) for image in images], return_tensors="pt")["pixel_values"]
    weight = next(policy.model.model.vision_model.parameters())
    return batch.to(weight.device, weight.dtype)
