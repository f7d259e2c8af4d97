"""Every sweep: W&B accepts it, and every point of its grid is a command that composes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stage import launch, sweep_file
from stage.sweep_file import command, faults, load, points
from tests.test_conf import EXPERIMENTS, all_faults, composed

SWEEPS = EXPERIMENTS.parent / "sweeps"
FILES = sorted(SWEEPS.glob("*.yaml"))


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
        ({"metric": {"name": "loss/total", "goal": "maximize"}}, "no score that training logs"),
        ({"metric": {"name": "validation/reward"}}, "metric has a name and a goal"),
        ({"parameters": {"seed": {"values": [1, 1]}}}, "seed: values are different"),
        ({"parameters": {"seed": {"min": 1, "max": 2}}}, "seed: a parameter of a grid"),
        (
            {"command": ["${program}", "output=run", "${args_no_hyphens}"]},
            "output needs ${oc.env:WANDB_RUN_ID}",
        ),
        ({"command": ["${program}", "output=${oc.env:WANDB_RUN_ID}"]}, "${args_no_hyphens} is missing"),
    ],
)
def test_the_checker_finds_what_is_planted(changes: dict[str, Any], fault: str | None) -> None:
    found = list(faults({**load(FILES[0]), **changes}))
    assert (not found) if fault is None else (len(found) == 1 and fault in found[0])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"paramters": {}}, "paramters is no key of a sweep. Known keys are command,"),
        (
            {"parameters": {"algorithm.lamda": {"value": 1}}},
            "algorithm.lamda=1: Could not override 'algorithm.lamda'",
        ),
        (
            {"parameters": {"experiment": {"values": ["tiny_grp"]}}},
            "experiment=tiny_grp: In 'train': Could not find",
        ),
        ({"name": None, "project": None}, "name is missing (and 1 more). Known keys"),
    ],
)
def test_a_mistake_is_one_line(
    changes: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = {key: value for key, value in {**load(FILES[0]), **changes}.items() if value is not None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(SystemExit) as caught:
        sweep_file.main([str(FILES[2]), str(tmp_path / "mine.yaml")])
    (text,) = str(caught.value.code).splitlines()
    assert text.startswith(f"error: {tmp_path / 'mine.yaml'}: ") and line in text
    assert capsys.readouterr().out == f"{FILES[2]}: 30 runs, and every one of them composes\n"
