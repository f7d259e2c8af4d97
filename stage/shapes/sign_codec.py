"""Pretraining the codec of the signs: one code for each board and for each letter in each colour scheme.

Trained as the codec of the shapes is (`stage.shapes.vq`), codes did not tell 26 letters in nine schemes apart. What a
patch shows is known here, so the codec is told: code k stands for content k of `Signs.contents`. The encoder learns to
find that code, the decoder to paint from it, and both move the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAE

from stage.shapes.signs import BOARDS, LETTERS, SCHEMES, SIGN_WORLD, Signs, quilt, render, scheme_colors
from stage.shapes.steps import Stateful, resumable
from stage.shapes.vq import to_pixels

RATE = 1e-3
SHARPNESS = 16.0  # of the softmax over cosines between a latent and all codes


class SignCodes(torch.nn.Module):
    """Unit codes of all contents: a letter's code is a vector of the letter plus one of its scheme.

    So codes of one letter in two schemes, and of two letters in one scheme, are alike.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.board = torch.nn.Parameter(F.normalize(torch.randn(len(BOARDS), size), dim=1))
        self.scheme = torch.nn.Parameter(F.normalize(torch.randn(len(SCHEMES), size), dim=1))
        self.letter = torch.nn.Parameter(F.normalize(torch.randn(len(LETTERS), size), dim=1))

    def forward(self) -> Tensor:
        """Codes `[CONTENTS, C]` in the order of `Signs.contents`."""
        lettered = (self.scheme[:, None] + self.letter).flatten(0, 1)
        return F.normalize(torch.cat([self.board, lettered]), dim=1)


def painting(model: JanusVQVAE, codes: Tensor, signs: Signs, pixels: Tensor) -> Tensor:
    """L1 + 2 L2 between `pixels` `[N, 3, H, W]` and what the decoder makes of the right codes.

    Letters and their rim are weighted six times.
    """
    grid = SIGN_WORLD.grid
    given = codes[signs.contents()].view(len(signs), grid, grid, -1).permute(0, 3, 1, 2)
    error = model.decoder(model.post_quant_conv(given)).float() - pixels
    weight = 1 + 5 * ink(pixels, scheme_colors(codes.device)[0][signs.scheme])
    return (weight * (error.abs() + 2 * error.square())).mean()


def finding(model: JanusVQVAE, codes: Tensor, signs: Signs, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats of the right code for each patch, and the share of patches where it was found."""
    content = signs.contents().flatten()
    latents = model.quant_conv(model.encoder(pixels)).permute(0, 2, 3, 1).flatten(0, 2).float()
    with torch.autocast(codes.device.type, enabled=False):
        score = SHARPNESS * F.normalize(latents, dim=1) @ codes.T
    return F.cross_entropy(score, content), (score.argmax(dim=1) == content).float().mean()


def ink(pixels: Tensor, board: Tensor) -> Tensor:
    """1 on letters and up to three pixels around them, else 0: float `[N, 1, H, W]`, for boards `[N, L, 3]`."""
    grid, patch = SIGN_WORLD.grid, SIGN_WORLD.patch
    ground = board.view(-1, grid, grid, 3).permute(0, 3, 1, 2) / 127.5 - 1
    ground = ground.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
    drawn = ((pixels - ground).abs().amax(dim=1, keepdim=True) > 0.05).float()
    return F.max_pool2d(drawn, 7, stride=1, padding=3)


def train_codec(model: JanusVQVAE, folder: Path, steps: int, batch: int, generator: torch.Generator) -> None:
    """Trains encoder, decoder and codes of `model` in place on fresh pictures."""
    codes = SignCodes(model.quantize.embedding.weight.shape[1]).to(_device(model))

    def loss(signs: Signs, pixels: Tensor) -> dict[str, Tensor]:
        table = codes()
        model.quantize.embedding.weight.data.copy_(table.detach())
        found, right = finding(model, table, signs, pixels)
        return {"paint": painting(model, table, signs, pixels), "find": found, "right": right.detach()}

    trained = [*model.parameters(), *codes.parameters()]
    _train("vq", model, trained, {"codes": codes}, loss, folder, steps, batch, generator)


def train_painter(
    model: JanusVQVAE, folder: Path, steps: int, batch: int, generator: torch.Generator
) -> None:
    """Trains the decoder of `model` alone: what a Q has and an O has not takes longer to learn than to recognise."""
    table = model.quantize.embedding.weight.detach()

    def loss(signs: Signs, pixels: Tensor) -> dict[str, Tensor]:
        return {"paint": painting(model, table, signs, pixels)}

    trained = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    _train("paint", model, trained, {}, loss, folder, steps, batch, generator)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _train(
    name: str,
    model: JanusVQVAE,
    trained: list[torch.nn.Parameter],
    others: Mapping[str, Stateful],
    losses: Callable[[Signs, Tensor], Mapping[str, Tensor]],
    folder: Path,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Minimises the sum of those `losses` that have a gradient."""
    device = _device(model)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.05)

    def step(i: int) -> Mapping[str, Tensor]:
        signs = quilt(batch, generator, device)
        pixels = to_pixels(render(signs)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = losses(signs, pixels)
        optimizer.zero_grad(set_to_none=True)
        torch.stack([value for value in found.values() if value.requires_grad]).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        return {key: value.detach() for key, value in found.items()}

    parts = {"model": model, **others, "optimizer": optimizer, "schedule": schedule}
    resumable(name, folder, steps, parts, generator, step, "model")
    model.eval().to(memory_format=torch.contiguous_format)
