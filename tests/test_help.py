"""Command lines that answer `--help` and a mistyped option without the packages that take seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "lightning", "hydra"}
PROGRAMS = {
    "stage.speed": ("--models", "cuda where there is one"),
    "stage.speed.scaling": ("--size", "--strategy"),
    "stage.policy.checkpoint": ("convert",),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("given", "status"), [("--help", 0), ("--mistyped", 2)])
def test_nothing_heavy_is_imported(name: str, given: str, status: int, root: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", name, given]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & HEAVY
    assert all(word in done.stdout for word in PROGRAMS[name]) or status


def test_the_options_of_a_conversion_are_explained_at_once(root: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "stage.policy.checkpoint", "convert", "--help"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "{transformers,multi_modality}" in done.stdout and "(2048)" in done.stdout
    assert not {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()} & HEAVY
