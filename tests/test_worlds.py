"""`reward=ocr` alone finds the embedded model that writes; whatever the command line names itself stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
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
    asked = with_world(given, CONF / "worlds.yaml")
    assert [word for word in asked if word not in given] == added
    assert [word for word in asked if word in given] == given


@pytest.mark.parametrize("flags", [[], ["--cfg", "job"], ["--cfg", "job", "--resolve"], ["-m"]], ids=" ".join)
def test_hydra_reads_what_is_added_before_flags(flags: list[str]) -> None:
    asked = with_world(["reward=ocr", "updates=40", *flags], CONF / "worlds.yaml")
    read = get_args_parser().parse_args(asked)
    assert sorted(read.overrides) == ["data=signs", "model=tiny_text", "reward=ocr", "updates=40"]


@pytest.mark.parametrize("reward", OmegaConf.load(CONF / "worlds.yaml"))
def test_every_world_names_options_that_compose(reward: str) -> None:
    asked = with_world([f"reward={reward}"], CONF / "worlds.yaml")
    assert len(asked) > 1
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", asked)
    assert config.model.path and config.data.train
