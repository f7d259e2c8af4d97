"""The aesthetic head on a shared tower, beside matrix products in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stage.rewards.aesthetic import AestheticReward, Head
from stage.rewards.clip import ClipReward
from tests.rewards.hard_times import refuses_bad_images, survives_a_small_card
from tests.rewards.tiny_towers import PROMPTS, pictures, tiny_clip

SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 4, "architecture": "tiny-clip"}


def published(width: int) -> dict[str, torch.Tensor]:
    """A state dict under the names of sac+logos+ava1-l14-linearMSE.pth."""
    sizes, names = (width, 1024, 128, 64, 16, 1), ("0", "2", "4", "6", "7")
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, before, after in zip(names, sizes[:-1], sizes[1:], strict=True):
        state[f"layers.{name}.weight"] = torch.randn(after, before, generator=generator) / before**0.5
        state[f"layers.{name}.bias"] = torch.randn(after, generator=generator)
    return state


@pytest.fixture
def files(tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    model, state = tiny_clip(tmp_path / "configs"), published(16)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    paths = {"path": str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth"), "tower_path": str(tmp_path)}
    return model, state, {**SETTINGS, **paths, "revision": None, "tower_revision": None}


def test_scores_are_the_head_on_unit_features(files: Any) -> None:
    model, state, settings = files
    images = pictures(3, 2, 32, 32)
    scorer = AestheticReward(**settings)
    scores = scorer(images, PROMPTS)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((images.flatten(0, 1) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        x = model.encode_image(pixels).double()
    x = x / x.norm(dim=1, keepdim=True)
    for name in ("0", "2", "4", "6", "7"):  # no activation between the layers
        x = x @ state[f"layers.{name}.weight"].double().T + state[f"layers.{name}.bias"].double()
    torch.testing.assert_close(scores.parts.double(), x.reshape(3, 2, 1), atol=1e-4, rtol=0)
    low, high = scorer.limits
    assert low < x.min() and x.max() < high and scores.parts.std() > 1e-2


def test_limits_are_reached_at_the_slope() -> None:
    """For w = (3, 4) through layers that pass it on and bias 2: from 2 - 5 to 2 + 5."""
    head = Head(2).double()
    state = {name: torch.zeros_like(value) for name, value in head.state_dict().items()}
    for name in "02467":
        state[f"layers.{name}.weight"][0, 0] = 1.0
    state["layers.0.weight"][0] = torch.tensor([3.0, 4.0])
    state["layers.7.bias"][0] = 2.0
    head.load_state_dict(state)
    assert head.limits() == pytest.approx((-3.0, 7.0))


def test_the_tower_is_shared_with_clip(files: Any) -> None:
    settings = files[2]
    scorer = AestheticReward(**settings)
    clip = ClipReward(path=settings["tower_path"], revision=None, **SETTINGS)
    assert clip.tower is scorer.tower
    assert scorer.provenance["tower"] == clip.provenance
    assert list(scorer.provenance["sha256"]) == ["sac+logos+ava1-l14-linearMSE.pth"]


def test_heads_that_do_not_fit(files: Any, tmp_path: Path) -> None:
    settings = files[2]
    torch.save(published(8), tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="wants 8 numbers and tiny-clip gives 16"):
        AestheticReward(**{**settings, "path": str(tmp_path / "narrow.pth")})
    torch.save({**published(16), "layers.9.bias": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match="has besides 1 tensors"):
        AestheticReward(**{**settings, "path": str(tmp_path / "more.pth")})
    with pytest.raises(
        FileNotFoundError, match=r"hf download trl-lib/ddpo-aesthetic-predictor aesthetic-model\.pth"
    ):
        AestheticReward(**{**settings, "path": str(tmp_path / "none.pth")})


def test_a_small_card_and_bad_images(files: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    scorer = AestheticReward(**{**files[2], "batch_size": 9})
    images = pictures(3, 3)
    refuses_bad_images(scorer, images, PROMPTS)
    survives_a_small_card(lambda: (scorer, scorer.tower.batches), images, PROMPTS, monkeypatch, caplog, 1e-4)
