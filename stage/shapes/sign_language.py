"""Pretraining the writer: a language model that plans a sign in words and draws it letter by letter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration

from stage.shapes.language import (
    CAPTION_DROPOUT,
    descend,
    drawing_parameters,
    drop_caption,
    hidden_states,
)
from stage.shapes.sign_corpus import Pages


def losses(model: JanusForConditionalGeneration, pages: Pages, dropped: Tensor) -> dict[str, Tensor]:
    """Cross entropy in nats a token: `image`, and `text` of plans unless the prompt is `dropped` `[N, 1]`."""
    ids, tokens, length = drop_caption(pages.ids, dropped), pages.tokens.long(), pages.ids.shape[1]
    hidden = hidden_states(model, ids, tokens)
    image = model.model.generation_head(hidden[:, length - 1 :])
    text = model.lm_head(hidden[:, : length - 1])
    said = (pages.said & ~dropped)[:, 1:]
    each = F.cross_entropy(text.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return {
        "image": F.cross_entropy(image.flatten(0, 1).float(), tokens.flatten()),
        "text": (each * said.flatten()).sum() / said.sum().clamp(min=1),
    }


def train_writer(
    model: JanusForConditionalGeneration,
    clean: Pages,
    noisy: Pages,
    clean_steps: int,
    folder: Path,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Trains on `clean` pages for `clean_steps`, then on `noisy` ones: copying comes first, then how often to err."""

    def loss(i: int) -> Mapping[str, Tensor]:
        pages = clean if i < clean_steps else noisy
        rows = torch.randint(len(pages.ids), (batch,), generator=generator, device=model.device)
        drawn = Pages(pages.ids[rows], pages.said[rows], pages.tokens[rows])
        dropped = torch.rand(batch, 1, generator=generator, device=model.device) < CAPTION_DROPOUT
        return losses(model, drawn, dropped)

    trained = [*drawing_parameters(model), *model.lm_head.parameters()]
    descend(model, trained, loss, folder, steps, generator)
