"""`reward=ocr` alone finds the embedded model that writes; whatever the command line names itself stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from stage.worlds import with_world

CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["reward=ocr"], ["model=tiny_text", "data=signs"]),
        (["seed=3", "reward=ocr", "-m"], ["model=tiny_text", "data=signs"]),
        (["reward=ocr", "model=janus_pro_7b"], ["data=signs"]),
        (["reward=ocr", "data=shapes", "data.train=a.txt"], ["model=tiny_text"]),
        (["reward=ocr", "model.dtype=bfloat16"], ["model=tiny_text", "data=signs"]),
        (["reward=ocr", "model=tiny", "data=shapes"], []),
        (["reward=ocr", "resume=a/last.ckpt"], []),
        (["reward=ocr", "experiment=some"], []),
        (["reward=ocr,shapes", "-m"], []),
        (["reward=shapes"], []),
        (["reward.processes=0"], []),
        (["--help"], []),
        ([], []),
    ],
)
def test_what_is_added(given: list[str], added: list[str]) -> None:
    assert with_world(given, CONF / "worlds.yaml") == given + added


@pytest.mark.parametrize("reward", OmegaConf.load(CONF / "worlds.yaml"))
def test_every_world_names_options_that_compose(reward: str) -> None:
    asked = with_world([f"reward={reward}"], CONF / "worlds.yaml")
    assert len(asked) > 1
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", asked)
    assert config.model.path and config.data.train
