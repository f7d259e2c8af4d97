"""Every sweep: W&B accepts it, and every point of its grid is a command that composes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stage import launch
from tests.test_conf import EXPERIMENTS, all_faults, composed

SWEEPS = EXPERIMENTS.parent / "sweeps"
FILES = sorted(SWEEPS.glob("*.yaml"))
# The keys of W&B's sweep configuration: docs.wandb.ai/models/sweeps/define-sweep-configuration.
TOP = {
    "program",
    "entity",
    "project",
    "description",
    "name",
    "method",
    "metric",
    "parameters",
    "early_terminate",
}
TOP |= {"command", "run_cap"}
METRICS = re.compile(r"(validation/(reward|strict)|reward/\w+)")


def faults(sweep: Mapping[str, Any]) -> Iterator[str]:
    """What W&B would refuse, silently ignore, or run without an objective."""
    for key in sorted(set(sweep) - TOP):
        yield f"{key} is no key of a sweep"
    for key in sorted(
        {"program", "method", "metric", "parameters", "command", "name", "project"} - set(sweep)
    ):
        yield f"{key} is missing"
    if sweep.get("method") != "grid":
        yield "method: only a grid has points to list"
    for name, parameter in sweep.get("parameters", {}).items():
        if not isinstance(parameter, Mapping) or set(parameter) not in ({"values"}, {"value"}):
            yield f"{name}: a parameter of a grid has value or values"
        elif "values" in parameter and (
            not parameter["values"] or len(set(parameter["values"])) < len(parameter["values"])
        ):
            yield f"{name}: values are different and at least one"
    metric = sweep.get("metric", {})
    if set(metric) != {"name", "goal"} or metric["goal"] not in ("minimize", "maximize"):
        yield "metric has a name and a goal, minimize or maximize"
    elif not METRICS.fullmatch(metric["name"]):
        yield f"{metric['name']} is no metric that training logs"


def load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def points(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each run of a grid."""
    parameters = {name: p.get("values", [p.get("value")]) for name, p in sweep["parameters"].items()}
    choices = [[(name, value) for value in values] for name, values in parameters.items()]
    return [dict(point) for point in itertools.product(*choices)]


def command(sweep: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    """What W&B's agent would start for a point, by W&B's own code."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils", reason="the extra wandb is not installed")
    arguments = {name: {"value": value} for name, value in point.items()}
    values = utils.create_sweep_command_args({"args": arguments})
    values |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
    words: list[str] = []
    for word in utils.create_sweep_command(sweep["command"]):
        macro = str(word).startswith("${") and str(word).endswith("}")
        words += values[word[2:-1]] if macro else [str(word)]
    return words


@cache
def check(overrides: tuple[str, ...]) -> None:
    config = composed("train", *overrides)
    assert all_faults(config) == []
    launch.check(config)
    assert not OmegaConf.missing_keys(config)
    instantiate(config.algorithm)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_is_one_that_wandb_knows(file: Path) -> None:
    assert list(faults(load(file))) == []
    assert load(file)["name"] == file.stem
    question, started = file.read_text(encoding="utf-8").splitlines()[:2]
    assert question.startswith("# ") and f"? {len(points(load(file)))} runs" in question
    assert started == f"# wandb sweep sweeps/{file.name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schema_of_wandb_accepts_it(file: Path) -> None:
    engine = pytest.importorskip(
        "sweeps.config.cfg", reason="W&B's sweeps engine, which has its JSON schema, is not installed"
    )
    assert engine.schema_violations_from_proposed_config(load(file)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_point_composes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "an_id")
    sweep, folders = load(file), set()
    for point in points(sweep):
        words = command(sweep, point)
        assert words[:3] == ["/usr/bin/env", "python", "train.py"]
        overrides = OverridesParser.create().parse_overrides(words[3:])
        assert not any(override.is_sweep_override() for override in overrides)
        given = {str(o.key_or_group): o.value() for o in overrides}
        assert {name: given[name] for name in point} == point  # nothing is lost or rewritten on the way
        assert given["logger.group"] == file.stem
        folders.add(given["output"])
        check(tuple(word for word in words[3:] if not word.startswith("seed=")))
        check(("experiment=tiny_stage", f"seed={point['seed']}"))
    assert folders == {f"outputs/sweeps/{file.stem}/${{oc.env:WANDB_RUN_ID}}"}
    assert composed("train", *words[3:]).output == f"outputs/sweeps/{file.stem}/an_id"


def test_the_table_lists_every_sweep() -> None:
    text = (SWEEPS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (\d+) \|$", text, re.MULTILINE)
    found = [(f.stem, f.read_text(encoding="utf-8").split("?")[0].removeprefix("# ") + "?") for f in FILES]
    assert [(name, question) for name, question, _ in rows] == found
    assert [int(count) for *_, count in rows] == [len(points(load(file))) for file in FILES]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"paramters": {}}, "paramters is no key of a sweep"),
        ({"method": "bayes"}, "method: only a grid"),
        ({"metric": {"name": "validation/rewards", "goal": "maximize"}}, "no metric that training logs"),
        ({"metric": {"name": "validation/reward"}}, "metric has a name and a goal"),
        ({"parameters": {"seed": {"values": [1, 1]}}}, "seed: values are different"),
        ({"parameters": {"seed": {"min": 1, "max": 2}}}, "seed: a parameter of a grid"),
    ],
)
def test_the_checker_finds_what_is_planted(changes: dict[str, Any], fault: str | None) -> None:
    found = list(faults({**load(FILES[0]), **changes}))
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])
