"""The second recipe of the release, composed from its file and run on small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from stage.types import Prompt
from tests.rewards.tiny_models import save_gdino, save_git
from tests.rewards.tiny_towers import pictures, tiny_clip

PROMPTS = (
    Prompt(0, "a red car", {"task_type": "color", "nouns": ["car"], "attr_nouns": ["red car"]}),
    Prompt(1, "a cat and a dog", {"task_type": "object", "nouns": ["cat", "dog"]}),
)


def test_hps_git_and_gdino_add_up(root: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": tiny_clip(tmp_path).state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    places = {"hps": tmp_path, "git": tmp_path / "git", "gdino": tmp_path / "gdino"}
    save_git(places["git"])
    save_gdino(places["gdino"])
    overrides = ["reward=hps_git_gdino", "reward.scorers.hps.architecture=tiny-clip"]
    for name, place in places.items():
        overrides += [
            f"reward.scorers.{name}.{key}" for key in (f"path={place}", "device=cpu", "dtype=float32")
        ]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        config = compose("train", overrides).reward
    combined = instantiate(config)
    combined.check(PROMPTS)
    with pytest.raises(ValueError, match=r"git: .*must list the nouns"):
        combined.check((Prompt(2, "rain"),))
    assert combined.provenance["git"]["path"] == str(places["git"])
    assert list(combined.provenance["hps"]["sha256"]) == ["HPS_v2.1_compressed.pt"]
    images = pictures(2, 2, 64, 64)
    scores = combined(images, PROMPTS)
    assert scores.names == ("hps/score", "git/score", "gdino/score") and scores.weights == (1.0, 1.0, 1.0)
    for index, name in enumerate(places):
        alone = instantiate(config.scorers[name])(images, PROMPTS)
        assert torch.equal(scores.parts[..., index], alone.parts[..., 0])
        assert scores.ranges is not None and (scores.ranges[index],) == alone.ranges
