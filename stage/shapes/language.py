"""Pretraining, third stage: the language model that draws, next image token by next image token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration

from stage.shapes.corpus import Captions, sample
from stage.shapes.prompts import TASKS
from stage.shapes.scenes import World, render
from stage.shapes.steps import Stateful, resumable
from stage.shapes.tiny import BEGIN, BOI, PAD
from stage.shapes.vq import encode

CHUNK = 4096  # scenes encoded together
CAPTION_DROPOUT = 0.1  # captions replaced by padding, so that guidance has an unconditional model


@dataclass(frozen=True)
class Bank:
    """Encoded scenes: caption index int64 `[N]` and image tokens int16 `[N, L]`, on the training device."""

    caption: Tensor
    tokens: Tensor

    @classmethod
    @torch.no_grad()
    def draw(
        cls,
        model: JanusForConditionalGeneration,
        captions: Captions,
        world: World,
        noise: float,
        size: int,
        generator: torch.Generator,
    ) -> Bank:
        """`size` fresh scenes, tasks in equal shares, `noise` of them at odds with their caption."""
        device = captions.count.device
        by_task = [(captions.task == task).nonzero()[:, 0] for task in range(len(TASKS))]
        drawn, tokens = [], []
        for _ in range(-(-size // CHUNK)):
            picked = [
                pool[torch.randint(len(pool), (CHUNK // len(TASKS) + 1,), generator=generator, device=device)]
                for pool in by_task
            ]
            index = torch.cat(picked)[:CHUNK]
            scenes, _ = sample(captions, index, noise, world, generator)
            drawn.append(index)
            tokens.append(encode(model.model.vqmodel, render(scenes, world)).to(torch.int16))
        return cls(torch.cat(drawn), torch.cat(tokens))


def train_language(
    model: JanusForConditionalGeneration,
    prompt_ids: Tensor,
    bank: Bank,
    folder: Path,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Next-token prediction of image tokens given left-padded prompts `[M, T]`, which end in the image start token."""
    device = prompt_ids.device

    def loss(i: int) -> Mapping[str, Tensor]:
        rows = torch.randint(len(bank.caption), (batch,), generator=generator, device=device)
        ids, tokens = prompt_ids[bank.caption[rows]], bank.tokens[rows].long()
        dropped = torch.rand(batch, 1, generator=generator, device=device) < CAPTION_DROPOUT
        logits = image_logits(model, drop_caption(ids, dropped), tokens)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())}

    descend(model, drawing_parameters(model), loss, folder, steps, generator)


def drawing_parameters(model: JanusForConditionalGeneration) -> list[torch.nn.Parameter]:
    """What drawing needs of the language model: all but the text head."""
    trained = [*model.model.language_model.parameters(), *model.model.generation_embeddings.parameters()]
    return [
        *trained,
        *model.model.generation_aligner.parameters(),
        *model.model.generation_head.parameters(),
    ]


def descend(
    model: JanusForConditionalGeneration,
    trained: list[torch.nn.Parameter],
    losses: Callable[[int], Mapping[str, Tensor]],
    folder: Path,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Minimises the sum of `losses(i)` over `trained`, saving as it goes; `losses` are also what is printed."""
    optimizer = torch.optim.AdamW(trained, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.04)
    device = trained[0].device
    model.train()

    def step(i: int) -> Mapping[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = losses(i)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(found.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        return {name: value.detach() for name, value in found.items()}

    parts: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    resumable("language", folder, steps, parts, generator, step, "model")
    model.eval()


def drop_caption(ids: Tensor, dropped: Tensor) -> Tensor:
    """Replaces the caption by padding where `dropped` `[N, 1]`; begin and image start tokens stay in their place.

    These are the unconditional rows of guidance, as transformers' Janus builds them.
    """
    return torch.where(dropped & (ids != BEGIN) & (ids != BOI), PAD, ids)


def image_logits(model: JanusForConditionalGeneration, ids: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[N, L, V]` of tokens `[N, L]` after prompts `[N, T]`."""
    return model.model.generation_head(hidden_states(model, ids, tokens)[:, ids.shape[1] - 1 :])


def hidden_states(model: JanusForConditionalGeneration, ids: Tensor, tokens: Tensor) -> Tensor:
    """Last hidden states `[N, T + L - 1, D]` of prompts `[N, T]` and all but the last of tokens `[N, L]`.

    The mask hides the padding before the begin token, not the padding that stands for a dropped caption.
    """
    mask = (ids == BEGIN).cumsum(dim=1)
    images = model.prepare_embeddings_for_image_generation(tokens[:, :-1])
    embeds = torch.cat([model.get_input_embeddings()(ids).to(images.dtype), images], dim=1)
    mask = torch.cat([mask, mask.new_ones(images.shape[:2])], dim=1)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
