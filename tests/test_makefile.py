"""What `make` would run, without running it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run_make(root: Path, *words: str) -> str:
    """What make prints, uninfluenced by a `make test` that these tests may be running under."""
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "ARGS", "VENV", "PYTHON", "CHECKPOINT")
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(
        ["make", *words], cwd=root, env=env, capture_output=True, text=True, check=True
    ).stdout


def recipe(root: Path, *words: str) -> list[str]:
    """The commands that run the project's programs, in order, with the interpreter written as `python`."""
    lines = run_make(root, "-n", *words).splitlines()
    return [
        line.strip().replace(".venv/bin/", "") for line in lines if re.search(r"bin/python \w+\.py", line)
    ]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ("", r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-train"),
        ("seed=3 name=mine", r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-mine"),
        ("output=here/there seed=3", "here/there"),
        ("resume=outputs/day/run/checkpoints/last.ckpt", "outputs/day/run"),
    ],
)
def test_the_run_that_is_trained_is_the_run_that_is_evaluated(
    arguments: str, folder: str, root: Path
) -> None:
    train, evaluate = recipe(root, "train", f"ARGS={arguments}")
    found = re.match(rf"python train\.py output=({folder})( |$)", train)
    assert found, train
    assert evaluate == f"python evaluate.py checkpoint={found[1]}/checkpoints/last.ckpt"


def test_overrides_arrive(root: Path) -> None:
    train, evaluate = recipe(root, "train", "ARGS=algorithm=grpo seed=3", "CHECKPOINT=best")
    assert train.endswith(" algorithm=grpo seed=3")
    assert evaluate.endswith("/best.ckpt")
    assert recipe(root, "evaluate", "ARGS=checkpoint=x") == ["python evaluate.py checkpoint=x"]


@pytest.mark.parametrize("arguments", ["-m seed=1,2", "--help", "--cfg job"])
def test_what_is_no_single_run_is_not_evaluated(arguments: str, root: Path) -> None:
    assert recipe(root, "train", f"ARGS={arguments}") == [f"python train.py {arguments}"]


def test_plain_make_explains_every_target(root: Path) -> None:
    shown = run_make(root)
    phony = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == set(re.findall(r"^  make ([a-z-]+)", shown, re.MULTILINE))


def test_the_environment_of_mmdet_has_its_own_interpreter(root: Path) -> None:
    built = run_make(root, "-n", "env-mmdet", "MMDET_PYTHON=/opt/python3.11")
    assert built.strip() == "bash environments/mmdet.sh .venv-mmdet /opt/python3.11"


def test_an_interpreter_that_mmdet_cannot_use_is_refused(root: Path, tmp_path: Path) -> None:
    """An interpreter that says it is no Python 3.11 ends it before anything is made."""
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    other.chmod(0o755)
    run = subprocess.run(
        ["bash", "environments/mmdet.sh", str(tmp_path / "env"), str(other)],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "make env-mmdet MMDET_PYTHON=python3.11" in run.stderr
    assert not (tmp_path / "env").exists()
