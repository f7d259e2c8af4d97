"""Which embedded model and prompts a reward fits: `reward=ocr` alone trains the model that writes, on signs.

Hydra cannot express it (an option that is chosen by interpolation may not choose others), so the choice is made on the
command line, before Hydra reads it, and is recorded there like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def with_world(arguments: Sequence[str], file: Path) -> list[str]:
    """The command line, with the options that `file` has for its reward and that it does not choose itself.

    They stand beside the reward: behind a flag such as `--cfg job` argparse would not know them. Only a plain
    `reward=NAME` counts, not a sweep over rewards. A resumed run and an experiment bring their own.
    """
    given = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    worlds: Any = OmegaConf.to_container(OmegaConf.load(file))
    world = worlds.get(given.get("reward"), {})
    if "resume" in given or "experiment" in given:
        return list(arguments)
    added = [f"{group}={option}" for group, option in world.items() if group not in given]
    place = next((i + 1 for i, word in enumerate(arguments) if word.startswith("reward=")), 0)
    return [*arguments[:place], *added, *arguments[place:]]
