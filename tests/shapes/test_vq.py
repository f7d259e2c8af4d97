"""What the codec's training knows about patches, and how its codes start and move."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stage.shapes.scenes import COLORS, Scenes, World
from stage.shapes.vq import PLAIN, Codebook, contents, share


def test_contents_name_the_background_or_the_object() -> None:
    # A green (4th colour: 3) triangle (3rd class: 2) in cell 7 of the first scene, an absent object in cell 9.
    scenes = Scenes(
        kind=torch.tensor([[2, 0], [5, 1]]),
        color=torch.tensor([[3, 9], [0, 1]]),
        present=torch.tensor([[True, False], [True, True]]),
        center=torch.zeros(2, 2, 2),
        radius=torch.ones(2, 2),
        tone=torch.tensor([6, 1]),
    )
    shown = contents(scenes, torch.tensor([[7, 9], [0, 35]]), World()).view(2, 36)
    assert shown[0, 7] == PLAIN + 2 * len(COLORS) + 3
    assert shown[0, 9] == 6
    assert shown[1, 0] == PLAIN + 5 * len(COLORS) and shown[1, 35] == PLAIN + 1 * len(COLORS) + 1
    assert (shown[0] == 6).sum() == 35 and (shown[1] == 1).sum() == 34


def test_plain_patches_of_one_tone_share_their_mean() -> None:
    generator = torch.Generator().manual_seed(1)
    latents = F.normalize(torch.randn(7, 3, generator=generator, dtype=torch.float64), dim=1)
    content = torch.tensor([0, 4, 0, PLAIN + 2, 4, 0, PLAIN + 2])
    shared = share(latents, content)
    for tone in (0, 4):
        rows = [i for i in range(7) if content[i] == tone]
        mean = torch.stack([latents[i] for i in rows]).sum(0) / len(rows)
        for i in rows:
            assert torch.allclose(shared[i], mean / mean.norm(), atol=1e-12)
    assert torch.equal(shared[[3, 6]], latents[[3, 6]])  # objects keep their own, also two of a kind


def test_codes_start_on_every_cluster() -> None:
    # Six tight clusters of very different sizes: k-means started at random points would miss the small ones.
    generator = torch.Generator().manual_seed(2)
    poles = F.normalize(torch.cat([torch.eye(3), -torch.eye(3)]), dim=1)
    sizes = torch.tensor([900, 50, 20, 10, 5, 3])
    latents = poles.repeat_interleave(sizes, 0)
    latents = F.normalize(latents + 0.01 * torch.randn(latents.shape, generator=generator), dim=1)
    codebook = Codebook(6, 3)
    codebook.start(latents, generator)
    assert ((poles @ codebook.weight.T).amax(dim=1) > 0.99).all()


def test_a_dead_code_moves_to_a_latent_far_from_all() -> None:
    generator = torch.Generator().manual_seed(3)
    codebook = Codebook(2, 2)
    codebook.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    codebook.mean.copy_(codebook.weight * codebook.share[:, None])
    codebook.share[1] = 0.0
    latents = torch.tensor([[1.0, 0.0]] * 50 + [[-1.0, 0.0]])
    distance = 1 - (latents @ codebook.weight.T).amax(dim=1)
    codebook.follow(latents, torch.zeros(51, dtype=torch.long), distance, generator)
    assert torch.allclose(codebook.weight[1], torch.tensor([-1.0, 0.0]), atol=1e-5)
