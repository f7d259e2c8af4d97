"""Pretraining, first stage: the VQ model that turns a picture into one code a patch and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.janus.modeling_janus import JanusVQVAE

from stage.shapes.scenes import BACKGROUNDS, CLASSES, COLORS, Scenes, World, any_scenes, render, scatter
from stage.shapes.steps import Stateful, resumable

RATE = 8e-4
PLAIN = len(BACKGROUNDS)  # contents below this are backgrounds without an object
CONTENTS = PLAIN + len(CLASSES) * len(COLORS)


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
    """Unit codes learnt as running means of the latents they attract (VQ-VAE, arXiv 1711.00937, appendix A.1).

    A codebook trained by gradient from the first step collapsed to one code; so the model first learns to paint from
    continuous latents, and the codes then start on latents of real pictures.
    """

    weight: Tensor
    mean: Tensor
    share: Tensor

    def __init__(self, codes: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(torch.randn(codes, dimension), dim=1))
        self.register_buffer("mean", self.weight.clone())
        self.register_buffer("share", torch.ones(codes) / codes)

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> None:
        """Places the codes by k-means on unit latents `[M, C]`, starting far apart as k-means++ does."""
        far = latents.new_ones(len(latents))
        for code in self.weight:
            code.copy_(latents[torch.multinomial(far.clamp(min=1e-6), 1, generator=generator)[0]])
            far = torch.minimum(far, 1 - latents @ code)
        for _ in range(20):
            index = (latents @ self.weight.T).argmax(dim=1)
            total = torch.zeros_like(self.weight).index_add_(0, index, latents)
            empty = total.norm(dim=1, keepdim=True) < 1e-6
            self.weight.copy_(F.normalize(torch.where(empty, self.weight, total), dim=1))
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
        chance = distance.clamp(min=1e-6)
        again = latents[torch.multinomial(chance, len(share), replacement=True, generator=generator)]
        self.mean.copy_(torch.where(dead[:, None], again * 1e-4, self.mean))
        self.share.copy_(torch.where(dead, 1e-4, self.share))
        self.weight.copy_(F.normalize(self.mean, dim=1))


def contents(scenes: Scenes, cells: Tensor, world: World) -> Tensor:
    """What each patch shows, int64 `[N * g * g]`: a tone of the background, or PLAIN + class * colours + colour."""
    tone = scenes.tone[:, None]
    shown = torch.where(scenes.present, PLAIN + scenes.kind * len(COLORS) + scenes.color, tone)
    return tone.repeat(1, world.grid**2).scatter_(1, cells, shown).flatten()


def share(latents: Tensor, content: Tensor) -> Tensor:
    """Unit latents `[M, C]` where all plain patches of one tone are replaced by their mean; objects keep their own."""
    plain, tone = (content < PLAIN)[:, None], content.clamp(max=PLAIN - 1)
    mean = latents.new_zeros(PLAIN, latents.shape[1]).index_add(0, tone, latents * plain)
    return torch.where(plain, F.normalize(mean, dim=1)[tone], latents)


class VQTraining:
    """The state of training: L1 + 2 L2 with objects and their rim weighted six times.

    The first sixth of the steps runs without quantisation, see `Codebook`. All patches without an object share one
    latent for each tone of background. Left to itself the codec hides what an object is in the codes of the plain
    patches around it; a policy then has to get a whole picture of noise right, and no reward can teach it that.
    """

    def __init__(
        self, model: JanusVQVAE, world: World, steps: int, batch: int, generator: torch.Generator
    ) -> None:
        self.model = model.train().to(memory_format=torch.channels_last)
        self.world, self.batch, self.generator, self.warm = world, batch, generator, steps // 6
        self.device = next(model.parameters()).device
        self.codebook = Codebook(*model.quantize.embedding.weight.shape).to(self.device)
        # Reads class and colour from a code, so that no code stands for two of them. Dropped after training.
        self.probe = torch.nn.Linear(model.quantize.embedding.weight.shape[1], CONTENTS, device=self.device)
        self.rarity = torch.tensor([1.0] * PLAIN + [6.0] * (CONTENTS - PLAIN), device=self.device)
        self.optimizer = torch.optim.AdamW(
            [*model.parameters(), *self.probe.parameters()],
            lr=RATE,
            betas=(0.9, 0.95),
            weight_decay=1e-4,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, RATE, total_steps=steps + 1, pct_start=0.05
        )
        # Compiled, a step takes two thirds of the time; on a CPU the compiler would take longer than a trial.
        compiled = self.device.type == "cuda"
        self.encoder = torch.compile(model.encoder) if compiled else model.encoder
        self.decoder = torch.compile(model.decoder) if compiled else model.decoder

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels `[N, 3, H, W]` of fresh scenes, where ink and its rim are, float `[N, 1, H, W]`, contents."""
        cells = scatter(self.batch, 8, self.world, self.generator, self.device)
        scenes = any_scenes(cells, self.world, self.generator)
        pixels = to_pixels(render(scenes, self.world)).contiguous(memory_format=torch.channels_last)
        background = scenes.background[:, :, None, None] / 127.5 - 1
        ink = ((pixels - background).abs().amax(dim=1, keepdim=True) > 0.05).float()
        # The rim counts as ink: what tells a diamond from a circle is the background at its corners.
        return pixels, F.max_pool2d(ink, 7, stride=1, padding=3), contents(scenes, cells, self.world)

    def look(self, pixels: Tensor, encoder: Callable[[Tensor], Tensor]) -> Tensor:
        """Unit latents `[N * g * g, C]`, each as the encoder sees it."""
        latents = F.normalize(self.model.quant_conv(encoder(pixels)).float(), dim=1)
        return latents.permute(0, 2, 3, 1).flatten(0, 2)

    def place_codes(self) -> None:
        """Starts the codebook. Most patches are plain background: objects get the larger part of the codes."""
        found = []
        for _ in range(32):
            pixels, _, content = self.draw()
            with torch.no_grad():
                latents = share(self.look(pixels, self.model.encoder), content)
            rare = torch.rand(content.shape, generator=self.generator, device=self.device) < 0.02
            found.append(latents[(content >= PLAIN) | rare])
        self.codebook.start(torch.cat(found), self.generator)

    def quantize(self, latents: Tensor, warm: bool) -> tuple[Tensor, Tensor]:
        """What the decoder is given for `latents` `[M, C]`, and the nearest codes, both `[M, C]`."""
        with torch.autocast(self.device.type, enabled=False):
            nearness, index = (latents.detach() @ self.codebook.weight.T).max(dim=1)
        codes = self.codebook.weight[index]
        if warm:
            noise = 0.15 * torch.randn(latents.shape, generator=self.generator, device=self.device)
            return F.normalize(latents + noise, dim=1), codes
        self.codebook.follow(latents.detach(), index, 1 - nearness, self.generator)
        return latents + (codes - latents).detach(), codes

    def step(self, i: int) -> Mapping[str, Tensor]:
        """One update of the model and its codebook."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if i == self.warm:
                self.place_codes()
            pixels, ink, content = self.draw()
            latents = self.look(pixels, self.encoder)
            given, codes = self.quantize(share(latents, content), i < self.warm)
            named = F.cross_entropy(self.probe(10 * given).float(), content, weight=self.rarity)
            given = given.view(self.batch, self.world.grid, self.world.grid, -1).permute(0, 3, 1, 2)
            output = self.decoder(self.model.post_quant_conv(given)).float()
        error = output - pixels
        fit = ((1 + 5 * ink) * (error.abs() + 2 * error.square())).mean()
        # Each latent by itself, so that the encoder finds the shared code from one picture. Not before there are
        # codes: commitment to moving means pulled everything into one point.
        commitment = (latents - codes).square().sum(dim=1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        (fit + 0.05 * named + (0.2 * commitment if i >= self.warm else 0)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.model.quantize.embedding.weight.data.copy_(self.codebook.weight)
        alive = (self.codebook.share > 2e-5).float().mean()
        return {
            "loss": fit.detach(),
            "named": named.detach(),
            "commitment": commitment.detach(),
            "codes_used": alive,
        }


def train_vq(
    model: JanusVQVAE, world: World, folder: Path, steps: int, batch: int, generator: torch.Generator
) -> None:
    """Trains `model` in place on scenes of up to eight objects: much ink to learn from."""
    work = VQTraining(model, world, steps, batch, generator)
    parts: dict[str, Stateful] = {
        "model": model,
        "codebook": work.codebook,
        "probe": work.probe,
        "optimizer": work.optimizer,
        "schedule": work.schedule,
    }
    resumable("vq", folder, steps, parts, generator, work.step, "model")
    model.eval().to(memory_format=torch.contiguous_format)
