"""The W&B panels: what they show is logged, each variant has its runs, and nothing is sent unless asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")

from stage.report import dashboard
from tests.tiny_training import ROOT, objective, tiny_base, tiny_module
from tests.tiny_training import tiny_trainer as trainer

SWEEP = ROOT / "sweeps" / "vanilla_against_parts.yaml"


@cache
def printed(*arguments: str) -> Mapping[str, Any]:
    """What the program prints, without an account and without a network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": "/nowhere", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "stage.report.dashboard", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "printed only; --publish saves it"
    return json.loads(done.stdout)


def found(node: Any, key: str) -> list[Any]:
    """All values of a key, in order."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    here = [node[key]] if isinstance(node, dict) and key in node else []
    return here + [value for child in inner for value in found(child, key)]


def test_what_the_panels_show_is_what_training_logs(tmp_path: Path) -> None:
    module = tiny_module(tiny_base(tmp_path / "janus"), objective=objective("stage"), updates=1)
    trainer(tmp_path).fit(module)
    logged = {*module.latest, "validation/reward", "validation/strict"}  # the last two by the callback
    named = {name for plots in dashboard.SUBJECTS.values() for names in plots.values() for name in names}
    assert named <= logged, named - logged
    callbacks = (ROOT / "stage" / "callbacks.py").read_text(encoding="utf-8")
    assert all(
        f'"{name}"' in callbacks for name in (*dashboard.IMAGES, "validation/reward", "validation/strict")
    )


def test_a_section_a_subject_over_all_variants() -> None:
    view = printed(str(SWEEP), "--entity", "team")["workspace"]["section"]
    sections = view["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [*dashboard.SUBJECTS, "images"]
    subjects = {"reward parts", "entropy", "distance from the reference", "groups", "weights", "images"}
    assert subjects <= {section["name"] for section in sections}
    (runs,) = view["runSets"]
    variants = yaml.safe_load(SWEEP.read_text())["parameters"]["experiment"]["values"]
    kept = {item["key"]["name"]: item["value"] for item in runs["filters"]["filters"]}
    assert kept == {"name": variants, "group": "vanilla_against_parts"}
    plots = [
        panel["config"] for section in sections for panel in section["panels"] if "metrics" in panel["config"]
    ]
    assert plots and all(plot["groupBy"] == "name.value" and plot["groupArea"] == "stderr" for plot in plots)
    assert found(sections, "mediaKeys") == [["images/grid"]]


def test_a_section_a_variant_with_its_own_runs() -> None:
    blocks = printed(str(SWEEP), "--entity", "team")["report"]["blocks"]
    variants = yaml.safe_load(SWEEP.read_text())["parameters"]["experiment"]["values"]
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert headings == variants and len(grids) == len(variants)
    for variant, grid in zip(variants, grids, strict=True):
        (runs,) = grid["runSets"]
        assert [item["value"] for item in runs["filters"]["filters"]] == [variant, "vanilla_against_parts"]
        metrics = [name for names in found(grid, "metrics") for name in names]
        named = [name for plots in dashboard.SUBJECTS.values() for names in plots.values() for name in names]
        assert set(named) <= set(metrics) and found(grid, "mediaKeys") == [["images/grid"]]


def test_experiments_by_name() -> None:
    page = printed("tiny_grpo", "tiny_stage")
    (runs,) = page["workspace"]["section"]["runSets"]
    assert [item["value"] for item in runs["filters"]["filters"]] == [["tiny_grpo", "tiny_stage"]]


def test_a_sweep_without_experiments_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("parameters: {seed: {values: [1]}}\n")
    with pytest.raises(
        ValueError, match="the variants of a sweep are the values of its parameter experiment"
    ):
        dashboard.of_sweep(tmp_path / "other.yaml", "")


def test_publishing_saves_both(tmp_path: Path) -> None:
    """Against a server on the loopback: the views that arrive are those that are printed."""
    pytest.importorskip("sweeps", reason="W&B's sweeps engine, which has its JSON schema, is not installed")
    from tests.wandb_server import ENTITY, served

    with served() as server:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        command = [
            sys.executable,
            "-m",
            "stage.report.dashboard",
            str(SWEEP),
            "--entity",
            ENTITY,
            "--publish",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [view["type"] for view in server.views] == ["project-view", "runs"]
    wanted = printed(str(SWEEP), "--entity", "team")
    for view, name in zip(server.views, ("workspace", "report"), strict=True):
        sent = json.loads(view["spec"])
        assert found(sent, "metrics") == found(wanted[name], "metrics")
        assert found(sent, "filters") == found(wanted[name], "filters")
