"""Every experiment: a question, a command that composes whatever it names, an algorithm that can be built, a row."""

from __future__ import annotations

import itertools
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stage import launch
from tests.test_conf import EXPERIMENTS, all_faults, composed

FILES = sorted(EXPERIMENTS.glob("*.yaml"))
README = EXPERIMENTS / "README.md"


def first_lines(file: Path) -> tuple[str, str]:
    """Question and command of an experiment."""
    question, command = file.read_text(encoding="utf-8").splitlines()[:2]
    return question.removeprefix("# "), command.removeprefix("# ")


def jobs(command: str) -> list[list[str]]:
    """The overrides of each run of `python train.py [-m] ...`."""
    words = shlex.split(command)
    assert words[:2] == ["python", "train.py"], command
    overrides = OverridesParser.create().parse_overrides([word for word in words[2:] if word != "-m"])
    sweeps = any(override.is_sweep_override() for override in overrides)
    assert sweeps == ("-m" in words), f"several values need -m, one value none: {command}"
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in overrides
    ]
    return [[str(item) for item in job] for job in itertools.product(*choices)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_first_line_asks_and_the_second_answers(file: Path) -> None:
    question, command = first_lines(file)
    assert re.search(r"[?.]$", question) and len(question) < 130
    runs = jobs(command)
    named = {word.partition("=")[2] for run in runs for word in run if word.startswith("experiment=")}
    assert file.stem in named
    for seed in {word for run in runs for word in run if word.startswith("seed=")} - {"seed=1"}:
        runs = [run for run in runs if seed not in run]  # a seed changes nothing that could be wrong
    for run in runs:
        check(tuple(run))


@cache
def check(run: tuple[str, ...]) -> None:
    """One job of a command: nothing is unknown or missing, and the parts of its algorithm fit together."""
    config = composed("train", *run)
    assert all_faults(config) == []
    launch.check(config)
    assert not OmegaConf.missing_keys(config), run
    instantiate(config.algorithm)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_is_named_after_its_experiment(file: Path) -> None:
    assert OmegaConf.load(file).name == file.stem


def test_the_table_lists_every_experiment_with_its_own_words() -> None:
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[1], row[2]) for row in cells] == [(file.stem, *first_lines(file)) for file in FILES]


def test_recipes_have_the_numbers_of_the_release() -> None:
    """krennic999/STAGE, src/scripts/run_training_{geneval,hps,ocr}.py."""
    for name, lr, beta, prompts, entropy in (
        ("geneval", 5e-6, 0.03, 8, 0.4),
        ("hps", 1e-6, 0.01, 16, 0.0),
        ("ocr", 1e-6, 0.01, 8, 0.0),
    ):
        stage, grpo = (
            composed("train", f"experiment={name}_stage"),
            composed("train", f"experiment={name}_grpo"),
        )
        for config in (stage, grpo):
            assert (config.optimizer.lr, config.algorithm.beta) == (lr, beta)
            assert (config.data.prompts_per_update, config.group_size, config.updates) == (prompts, 8, 1600)
            assert (config.sampler.guidance_scale, config.sampler.temperature) == (5.0, 1.0)
            assert config.algorithm.distribution == "conditional" and config.model.template.name == "release"
            assert config.scheduler.end_factor == 0.0 and config.scheduler.total_iters == 1600
            assert {"generation_embeddings", "generation_aligner", "generation_head"} <= set(
                config.model.freeze
            )
        assert stage.algorithm.reweight_advantage and stage.algorithm.reweight_kl
        assert stage.algorithm.entropy_coefficient == entropy
        assert not (grpo.algorithm.reweight_advantage or grpo.algorithm.reweight_kl)
        assert grpo.algorithm.entropy_coefficient == 0
