"""Distances between images against open_clip itself, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stage.rewards.diversity import DiversityReward
from tests.rewards.tiny_towers import PROMPTS, open_clip_pixels, pictures, tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, DiversityReward]:
    folder = tmp_path_factory.mktemp("diversity")
    model = tiny_clip(folder / "configs", "tiny-diversity")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model, DiversityReward(str(folder), None, "tiny-diversity", "cpu", "float32", 4)


def test_distances_pair_by_pair(clip: tuple[Any, DiversityReward]) -> None:
    model, reward = clip
    images, pixels = pictures(2, 3, 32, 32), open_clip_pixels("tiny-diversity")
    found = reward(images, PROMPTS[:2]).parts[..., 0]
    for p in range(2):
        with torch.no_grad():
            seen = [model.encode_image(pixels(images[p, g])[None])[0].double() for g in range(3)]
        for g in range(3):
            far = [
                1 - float(seen[g] @ seen[h] / (seen[g].norm() * seen[h].norm())) for h in range(3) if h != g
            ]
            assert found[p, g].item() == pytest.approx(sum(far) / 2, abs=1e-4)
    assert found.min() > 1e-3


def test_equal_images_have_no_distance_and_one_image_has_none_to_say(
    clip: tuple[Any, DiversityReward],
) -> None:
    images = pictures(1, 1, 32, 32).expand(1, 3, 32, 32, 3)
    assert clip[1](images, PROMPTS[:1]).parts.abs().max() < 1e-5
    with pytest.raises(ValueError, match="between two images of a prompt, got 1"):
        clip[1](images[:, :1], PROMPTS[:1])
