"""Which embedded model and prompts a reward fits: `reward=ocr` alone trains the model that writes, on signs.

Hydra cannot express it (an option that is chosen by interpolation may not choose others), so the choice is made on the
command line, before Hydra reads it, and is recorded there like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf


def with_world(arguments: Sequence[str], folder: Path) -> list[str]:
    """The command line, with the options of `folder/REWARD.yaml` that it does not choose itself.

    Only a plain `reward=NAME` counts, not a sweep over rewards. A resumed run and an experiment bring their own.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    file = folder / f"{given.get('reward', '')}.yaml"
    if "resume" in given or "experiment" in given or not file.is_file():
        return list(arguments)
    world = OmegaConf.load(file)
    return [*arguments, *(f"{group}={option}" for group, option in world.items() if group not in given)]
