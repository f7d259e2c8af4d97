"""Every configuration composes, and every key of it is an argument of the class that it is for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from stage import launch

CONF = Path(__file__).resolve().parents[1] / "conf"
EXPERIMENTS = CONF.parent / "experiments"
MAINS = tuple(
    name for name in ("train", "evaluate", "sample", "serve", "diagnose") if (CONF / f"{name}.yaml").is_file()
)
OPTIONS = sorted(file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.glob("*/**/*.yaml"))
OPTIONS = [option for option in OPTIONS if not option.startswith("hydra/")]  # tests/test_multirun.py
# Places that only the user knows.
FOLDERS = {"reward/reader/paddleocr": ["reward.reader.folder=models"]}
# Arguments that the program adds to those of the configuration.
ADDED = {"lightning.pytorch.Trainer": {"logger", "callbacks"}}


@cache
def register() -> None:
    launch.register_experiments(EXPERIMENTS)


def composed(main: str, *overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(main, list(overrides))


def groups(main: str) -> list[str]:
    """The groups that a main configuration picks from."""
    defaults = OmegaConf.load(CONF / f"{main}.yaml").defaults
    return [
        str(key).removeprefix("override ")
        for entry in defaults
        if isinstance(entry, Mapping | DictConfig)
        for key in entry
    ]


def main_of(option: str) -> str:
    group = option.rpartition("/")[0]
    found = [main for main in MAINS if group.split("/")[0] in groups(main)]
    assert found, f"conf/{group} is picked by none of {MAINS}"
    return found[0]


def targets(node: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted name, mapping) of everything with a `_target_`."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield name, node
        for key, value in node.items():
            yield from targets(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from targets(value, f"{name}[{index}]")


def faults(name: str, node: Mapping[str, Any], own: str = "stage.") -> Iterator[str]:
    """What is wrong between the keys of a node and the signature of its target; `own` begins the targets of ours."""
    target = node["_target_"]
    found = get_object(target)
    parameters = inspect.signature(found).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    keys = {str(key) for key in node if not str(key).startswith("_")}
    for key in sorted(keys - set(parameters)):
        if not open_ended:
            yield f"{name}.{key} is no argument of {target}"
    for key in sorted(keys & ADDED.get(target, set())):
        yield f"{name}.{key} is set by the program"
    for key, parameter in parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        required = parameter.default is parameter.empty and not variable
        if required and key not in keys and not node.get("_partial_"):
            yield f"{target} needs {key}, which {name} does not say"
        # A number that decides a result stands in the file and nowhere else.
        if target.startswith(own) and key in keys and isinstance(parameter.default, int | float):
            yield f"{name}.{key} is stated in the file and again as a default of {target}"


def all_faults(config: DictConfig) -> list[str]:
    plain = OmegaConf.to_container(config, resolve=True)
    return [fault for name, node in targets(plain) for fault in faults(name, node)]


@pytest.mark.parametrize("main", MAINS)
def test_the_defaults_compose(main: str) -> None:
    config = composed(main)
    assert all_faults(config) == []


def parent_of(group: str) -> list[str]:
    """`reward=ocr` for the group reward/reader: an option that picks from it; none where `+` adds it to any."""
    outer, _, inner = group.rpartition("/")
    if not outer:
        return []
    picking = [
        file.stem
        for file in sorted((CONF / outer).glob("*.yaml"))
        if any(inner in entry for entry in dict(OmegaConf.load(file)).get("defaults", []))
    ]
    return [f"{outer}={picking[0]}"] if picking else []


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_one_class_with_its_arguments(option: str) -> None:
    group, _, name = option.rpartition("/")
    parent = parent_of(group)
    added = "" if parent or "/" not in group else "+"
    config = composed(main_of(option), *parent, f"{added}{group}={name}", *FOLDERS.get(option, []))
    assert all_faults(config) == []


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "model").glob("*.yaml")))
def test_every_model_can_change_its_attention_template_and_adapter(name: str) -> None:
    """Without a plus sign, as error messages tell the user to."""
    config = composed(
        "train",
        *(f"model={name}", "model.attention=eager", "model/adapter=lora", "model/template=release"),
    )
    assert (config.model.attention, config.model.template.name) == ("eager", "release")
    assert config.model.adapter.rank > 0


@pytest.mark.parametrize("name", sorted(file.stem for file in EXPERIMENTS.glob("*.yaml")) or [None])
def test_every_experiment_composes(name: str | None) -> None:
    if name is None:
        pytest.skip("experiments/ holds no experiment")
    config = composed("train", f"experiment={name}")
    assert all_faults(config) == []
    launch.check(config)


def test_train_lists_every_setting_that_is_known() -> None:
    assert set(composed("train")) == launch.KNOWN


def test_an_experiment_comes_after_the_file_itself() -> None:
    """The file's own values beat the groups, and an experiment beats both: otherwise it could not set `updates`."""
    defaults = list(OmegaConf.load(CONF / "train.yaml").defaults)
    assert defaults[-2] == "_self_" and "experiment" in defaults[-1]


class Example:
    """What the planted configurations of the next test are for."""

    def __init__(self, lr: float, *, name: str = "a", clip: float = 1.0) -> None:
        pass


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"rate": 1}, "x.rate is no argument of"),
        ({"name": "b"}, None),
        ({"clip": 2.0}, "x.clip is stated in the file and again as a default of"),
        ({"_remove_": "lr"}, "needs lr, which x does not say"),
    ],
)
def test_the_checker_finds_what_is_planted(changes: dict[str, Any], fault: str | None) -> None:
    node: dict[str, Any] = {"_target_": f"{Example.__module__}.Example", "lr": 1.0, **changes}
    node.pop(node.pop("_remove_", ""), None)
    found = list(faults("x", node, own=Example.__module__))
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])
