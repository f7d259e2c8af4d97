"""What the programs' --help tells people to type composes: groups, options and keys of the examples exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from stage import launch

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
MAINS = sorted(file.stem for file in CONF.glob("*.yaml") if "hydra" in OmegaConf.load(file))
EXAMPLE = re.compile(r"^python (?:-m )?(\S+) (.*)$")


def examples(page: str) -> Iterator[tuple[str, list[str]]]:
    """Program and overrides of each line of a page that is a command; words with a placeholder are left out."""
    for line in page.splitlines():
        found = EXAMPLE.match(re.split(r"  +(?=[^' ])", line.strip())[0])
        if found and not set(found[2].split()) & {"-m", "--config-dir", "ablation"}:
            words = [
                word for word in shlex.split(found[2]) if "=" in word and not re.search(r"NAME|\.\.\.$", word)
            ]
            yield found[1], words


def test_the_reader_of_examples_sees() -> None:
    page = "Examples:\n  python train.py a=1 'b=\"x, y\"'   some words\n  python -m stage.x c=... d=2\n  wandb x=1\n"
    assert list(examples(page)) == [("train.py", ["a=1", 'b="x, y"']), ("stage.x", ["d=2"])]


@pytest.mark.parametrize("main", MAINS)
def test_examples_of_the_help_compose(main: str) -> None:
    launch.register_experiments(ROOT / "experiments")
    page = OmegaConf.load(CONF / f"{main}.yaml").hydra.help
    found = [
        words
        for program, words in examples(page.template)
        if program == page.app_name.removeprefix("python -m ")
    ]
    for words in found:
        OverridesParser.create().parse_overrides(words)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            compose(main, words)
