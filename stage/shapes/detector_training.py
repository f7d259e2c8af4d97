"""Pretraining, second stage: the network that judges pictures of the embedded world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from stage.shapes.detector import STRIDE, ShapeNet
from stage.shapes.scenes import CLASSES, MAX_OBJECTS, Scenes, World, any_scenes, place, render, scatter
from stage.shapes.steps import Stateful, resumable


def targets(scenes: Scenes, world: World) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training targets on the map of S x S cells, S = size / 4.

    Returns:
        centre `[N, classes, S, S]` in [0, 1]: a bump of one cell around each centre; near bool `[N, S, S]`: cells whose
        colour and box are trained; colour int64 `[N, S, S]`; box `[N, 4, S, S]`: distances to the sides in pixels.
    """
    side, device, count = world.size // STRIDE, scenes.kind.device, len(scenes)
    axis = (torch.arange(side, device=device) + 0.5) * STRIDE
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    offset = (x - scenes.center[..., 0, None, None]) ** 2 + (y - scenes.center[..., 1, None, None]) ** 2
    bump = torch.exp(-offset / (2 * STRIDE**2)) * scenes.present[..., None, None]
    peak = bump.flatten(2).amax(dim=2)[..., None, None].clamp(min=1e-6)
    bump = bump / peak * scenes.present[..., None, None]  # exactly 1 in the cell of the centre
    centre = torch.zeros(count, len(CLASSES), side, side, device=device)
    index = scenes.kind[..., None, None].expand_as(bump)
    centre = centre.scatter_reduce(1, index, bump, "amax")
    strongest, owner = bump.max(dim=1)
    boxes = scenes.boxes()
    rows = torch.arange(count, device=device)[:, None, None]
    box = boxes[rows, owner]
    cx, cy = axis[None, None, :], axis[None, :, None]
    sides = torch.stack([cx - box[..., 0], cy - box[..., 1], box[..., 2] - cx, box[..., 3] - cy], dim=1)
    return centre, strongest > 0.4, scenes.color[rows, owner], sides


def spoil(images: Tensor, scenes: Scenes, world: World, generator: torch.Generator) -> tuple[Tensor, Scenes]:
    """Erases half of some objects, or splices two halves: such an object is no longer there.

    Each object is spoilt with probability 0.08. A half is replaced by the background, or by the same
    half of another picture.
    """
    device, count = images.device, len(images)
    hit = (torch.rand(scenes.present.shape, generator=generator, device=device) < 0.08) & scenes.present
    axis = torch.arange(world.size, device=device, dtype=torch.float32) + 0.5
    angle = torch.rand(scenes.present.shape, generator=generator, device=device) * 2 * torch.pi
    cells = scatter(count, MAX_OBJECTS, world, generator, device)
    other = render(any_scenes(cells, world, generator), world)
    splice = torch.rand(count, generator=generator, device=device) < 0.3
    plain = scenes.background[:, None, None, :].to(torch.uint8).expand_as(images)
    filler = torch.where(splice[:, None, None, None], other, plain)
    for k in range(scenes.kind.shape[1]):
        dx = axis[None, None, :] - scenes.center[:, k, 0, None, None]
        dy = axis[None, :, None] - scenes.center[:, k, 1, None, None]
        half = dx * angle[:, k].cos()[:, None, None] + dy * angle[:, k].sin()[:, None, None] > 0
        inside = torch.maximum(dx.abs(), dy.abs()) <= world.patch / 2
        cut = half & inside & hit[:, k, None, None]
        images = torch.where(cut[..., None], filler, images)
    kept = Scenes(**{**vars(scenes), "present": scenes.present & ~hit})
    return images, kept


def blurred(images: Tensor, generator: torch.Generator) -> Tensor:
    """The batch with blur of one random strength, noise and a shift of brightness, as uint8."""
    sigma = 0.05 + 1.1 * float(torch.rand((), generator=generator, device=images.device))
    pixels = gaussian_blur(images.permute(0, 3, 1, 2).float(), [5, 5], [sigma, sigma]).permute(0, 2, 3, 1)
    shape = (len(images), 1, 1, 3)
    shift = 12 * (2 * torch.rand(shape, generator=generator, device=images.device) - 1)
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    strength = 8 * torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device)
    return (pixels + shift + strength * noise).round().clamp(0, 255).to(torch.uint8)


def loss(net: ShapeNet, images: Tensor, scenes: Scenes, world: World) -> Tensor:
    """Focal loss of centres (CenterNet, arXiv 1904.07850, equation 1), cross entropy of colour, L1 of the box."""
    heat, color, box = net(images)
    centre, near, tone, sides = targets(scenes, world)
    positive = centre == 1
    log_yes, log_no = F.logsigmoid(heat.float()), F.logsigmoid(-heat.float())
    yes = -(log_no.exp() ** 2) * log_yes
    no = -((1 - centre) ** 4) * log_yes.exp() ** 2 * log_no
    objects = positive.sum().clamp(min=1)
    focal = torch.where(positive, yes, no).sum() / objects
    named = (F.cross_entropy(color.float(), tone, reduction="none") * near).sum() / near.sum().clamp(min=1)
    sized = ((box.float() - sides.clamp(min=0)).abs().mean(dim=1) * near).sum() / near.sum().clamp(min=1)
    return focal + named + 0.1 * sized


def train_detector(
    net: ShapeNet,
    decode: Callable[[Tensor], Tensor],
    world: World,
    folder: Path,
    steps: int,
    batch: int,
    generator: torch.Generator,
) -> None:
    """Trains on clean, spoilt, blurred and decoded pictures; `decode` maps uint8 images to their VQ reconstructions."""
    net.train()
    device = next(net.parameters()).device
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.05)

    # Half of the pictures stand in their cells and may touch; the others are anywhere, so that no position is learnt
    # as impossible.
    near, far = (
        World(world.size, world.patch, (5.5, 7.2), 0.8),
        World(world.size, world.patch, (5.5, 7.5), 5.0),
    )

    def step(i: int) -> Mapping[str, Tensor]:
        # A decoded picture is shown as it is: the codec turns a spoilt object into a whole one.
        decoded = i % 6 == 5
        loose = world if decoded else near if i % 2 else far
        spread = place if loose is far else scatter
        scenes = any_scenes(spread(batch, MAX_OBJECTS, loose, generator, device), loose, generator)
        images = render(scenes, loose)
        if decoded:
            images = decode(images)
        else:
            images, scenes = spoil(images, scenes, world, generator)
            images = images if i % 6 == 1 else blurred(images, generator)
        value = loss(net, images, scenes, world)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
        return {"loss": value.detach()}

    parts: dict[str, Stateful] = {"net": net, "optimizer": optimizer, "schedule": schedule}
    resumable("detector", folder, steps, parts, generator, step, "net")
    net.eval()
