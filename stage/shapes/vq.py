"""Pretraining, first stage: the VQ model that turns a picture into one code a patch and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAE

from stage.shapes.corpus import crowded
from stage.shapes.scenes import World, render
from stage.shapes.steps import resumable

RATE = 8e-4


def to_pixels(images: Tensor) -> Tensor:
    """uint8 `[N, H, W, 3]` to float `[N, 3, H, W]` in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """float `[N, 3, H, W]` in [-1, 1] to uint8 `[N, H, W, 3]`."""
    return ((pixels.float().permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def encode(model: JanusVQVAE, images: Tensor) -> Tensor:
    """uint8 images `[N, H, W, 3]` to token indices `[N, g * g]`.

    The decoder of Janus normalises codes, so the nearest code is the one at the smallest angle (LlamaGen's VQ,
    arXiv 2406.06525); with unit codes transformers' own `encode` finds the same one.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        latents = model.quant_conv(model.encoder(to_pixels(images)))
    codebook = F.normalize(model.quantize.embedding.weight.float(), dim=1)
    return torch.einsum("nchw,vc->nhwv", latents.float(), codebook).argmax(dim=-1).flatten(1)


class Codebook(torch.nn.Module):
    """Unit codes learnt as running means of the latents they attract (VQ-VAE's EMA update, arXiv 1711.00937, appendix A.1).

    Three trials with a codebook trained by gradient from the first step collapsed to one code; so the model first learns
    to paint from continuous latents, and the codes then start on latents of real pictures.
    """

    def __init__(self, codes: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(torch.randn(codes, dimension), dim=1))
        self.register_buffer("mean", self.weight.clone())
        self.register_buffer("share", torch.ones(codes) / codes)

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> None:
        """Places the codes by k-means on unit latents `[M, C]`."""
        self.weight.copy_(latents[self._pick(latents.new_ones(len(latents)), generator)])
        for _ in range(20):
            index = (latents @ self.weight.T).argmax(dim=1)
            total = torch.zeros_like(self.weight).index_add_(0, index, latents)
            empty = total.norm(dim=1) < 1e-6
            again = latents[self._pick(latents.new_ones(len(latents)), generator)]
            self.weight.copy_(F.normalize(torch.where(empty[:, None], again, total), dim=1))
        self.mean.copy_(self.weight / len(self.weight))
        self.share.fill_(1 / len(self.weight))

    @torch.no_grad()
    def follow(self, latents: Tensor, index: Tensor, distance: Tensor, generator: torch.Generator) -> None:
        """Moves each code towards its latents `[M, C]`.

        A code that fewer than 1 in 100,000 patches use starts anew on a latent that lies far from all codes.
        """
        share = torch.bincount(index, minlength=len(self.share)).float() / len(index)
        total = torch.zeros_like(self.mean).index_add_(0, index, latents) / len(index)
        self.share.lerp_(share, 0.02)
        self.mean.lerp_(total, 0.02)
        dead = self.share < 1e-5
        again = latents[self._pick(distance.clamp(min=1e-6), generator)]
        self.mean.copy_(torch.where(dead[:, None], again * 1e-4, self.mean))
        self.share.copy_(torch.where(dead, 1e-4, self.share))
        self.weight.copy_(F.normalize(self.mean, dim=1))

    def _pick(self, chance: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(chance, len(self.share), replacement=True, generator=generator)


def train_vq(
    model: JanusVQVAE, world: World, folder: Path, steps: int, batch: int, generator: torch.Generator
) -> None:
    """L1 + 2 L2, objects and their rim weighted six times; the first sixth without quantisation, see `Codebook`."""
    model.train().to(memory_format=torch.channels_last)
    device = next(model.parameters()).device
    codebook = Codebook(*model.quantize.embedding.weight.shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.05)
    warm = steps // 6
    # Compiled, a step takes a third of the time; on a CPU the compiler would take longer than a trial.
    encoder = torch.compile(model.encoder) if device.type == "cuda" else model.encoder
    decoder = torch.compile(model.decoder) if device.type == "cuda" else model.decoder

    def draw() -> tuple[Tensor, Tensor]:
        scenes = crowded(batch, 8, world, generator, device)
        pixels = to_pixels(render(scenes, world)).contiguous(memory_format=torch.channels_last)
        background = scenes.background[:, :, None, None] / 127.5 - 1
        ink = ((pixels - background).abs().amax(dim=1, keepdim=True) > 0.05).float()
        # The rim counts as ink: what tells a diamond from a circle is the background at its corners.
        return pixels, F.max_pool2d(ink, 7, stride=1, padding=3)

    def look(pixels: Tensor, through: Callable[[Tensor], Tensor]) -> Tensor:
        latents = F.normalize(model.quant_conv(through(pixels)).float(), dim=1)
        return latents.permute(0, 2, 3, 1).flatten(0, 2)

    def place_codes() -> None:
        # Most patches are plain background: objects get the larger part of the codes.
        found = []
        for _ in range(16):
            pixels, ink = draw()
            inked = F.avg_pool2d(ink, world.patch).flatten() > 0.5
            chosen = inked | (torch.rand(inked.shape, generator=generator, device=device) < 0.1)
            with torch.no_grad():
                found.append(look(pixels, model.encoder)[chosen])
        codebook.start(torch.cat(found), generator)

    def step(i: int) -> Mapping[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            if i == warm:
                place_codes()
            pixels, ink = draw()
            latents = look(pixels, encoder)
            with torch.autocast(device.type, enabled=False):
                nearness, index = (latents.detach() @ codebook.weight.T).max(dim=1)
            codes = codebook.weight[index]
            if i < warm:
                noise = 0.15 * torch.randn(latents.shape, generator=generator, device=device)
                given = F.normalize(latents + noise, dim=1)
            else:
                codebook.follow(latents.detach(), index, 1 - nearness, generator)
                given = latents + (codes - latents).detach()
            given = given.view(batch, world.grid, world.grid, -1).permute(0, 3, 1, 2)
            output = decoder(model.post_quant_conv(given)).float()
        error = output - pixels
        fit = ((1 + 5 * ink) * (error.abs() + 2 * error.square())).mean()
        commitment = (latents - codes).square().sum(dim=1).mean()
        optimizer.zero_grad(set_to_none=True)
        (fit + (0.1 * commitment if i >= warm else 0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.quantize.embedding.weight.data.copy_(codebook.weight)
        alive = (codebook.share > 2e-5).float().mean()
        return {"loss": fit.detach(), "commitment": commitment.detach(), "codes_used": alive}

    parts = {"model": model, "codebook": codebook, "optimizer": optimizer, "schedule": schedule}
    resumable("vq", folder, steps, parts, generator, step, "model")
    model.eval().to(memory_format=torch.contiguous_format)
